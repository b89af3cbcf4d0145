"""Which layouts fit, in which order, and why the others do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kinodit.launch.plan import show
from kinodit.launch.plan.estimate import Estimator, Settings
from kinodit.launch.plan.hardware import GIB, build_cluster
from kinodit.launch.plan.search import Found, divisors, layouts, search
from kinodit.launch.plan.state import Weights
from kinodit.launch.plan.workload import Workload
from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.presets import PRESETS
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.volume import Formats

CLIP = {"text": 512, "video": 21 * 30 * 52}
"""81 frames of 832 x 480, of 4 x 8 x 8 pixels a latent and 1 x 2 x 2 latents a token."""


def settings(
    model: MMDiTConfig, gpus: int, memory_gib: float, packs: int, **changes: object
) -> Settings:
    made = Settings(
        workload=Workload(model, CLIP, segments=1, packs=packs),
        weights=Weights(model),
        formats=Formats(4, 2, 4),
        cluster=build_cluster("H200", gpus, memory_gib, "ndr400", 8, 4.0),
        num_averages=1,
        micro_batches=0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def eight() -> Found:
    """14B on 8 GPUs of 141 GB, asked for as 8 replicas of everything."""
    asked = ParallelConfig(dp_replicate=8, dp_shard=1)
    return search(settings(PRESETS["14b"], 8, 141e9 / GIB, 8), asked, RematConfig("full"))


def test_replicas_of_a_14b_model_do_not_fit_into_141_gb(eight: Found) -> None:
    """A layout that people have really launched, and run out of memory."""
    asked = eight.asked
    assert asked is not None and asked.estimate is not None
    assert "needs" in asked.problem and "optimizer" in asked.problem
    # 14.2 billion numbers of 4 bytes: parameters, gradients, two moments, an average.
    assert asked.estimate.memory.total > 5 * 4 * 14.1e9
    assert not any(one.parallel.dp_replicate == 8 for one in eight.fitting)


def test_the_same_cluster_has_layouts_that_fit(eight: Found) -> None:
    usable = 141e9 - 4 * GIB
    assert all(one.memory.total <= usable for one in eight.fitting)
    sharded = [one for one in eight.fitting if one.parallel.dp_shard == 8]
    assert {"full"} <= {one.remat.mode for one in sharded}
    times = [one.time.step_s for one in eight.fitting]
    assert times == sorted(times)


def test_nothing_is_lost_between_fitting_and_refused(eight: Found) -> None:
    made = settings(PRESETS["14b"], 8, 141e9 / GIB, 8)
    every = list(layouts(made, ParallelConfig()))
    for one in every:
        assert one.dp_replicate * one.dp_shard * one.cp * one.tp == 8
    assert len({(p.dp_replicate, p.dp_shard, p.cp, p.ring, p.tp) for p in every}) == len(every)
    memory = eight.refused.pop("memory").count if "memory" in eight.refused else 0
    others = sum(group.count for group in eight.refused.values())
    assert len(eight.fitting) + memory == 5 * (len(every) - others)


def test_reasons_name_the_numbers() -> None:
    found = search(settings(PRESETS["300m"], 32, 80, 8), ParallelConfig(), RematConfig())
    assert "a step has 8 (data.packs_per_step)" in found.refused["packs"].example
    assert "12 heads" in found.refused["heads"].example
    assert found.asked is not None and "32 ranks want packs" in found.asked.problem


def test_a_layout_of_another_number_of_gpus_says_so() -> None:
    asked = ParallelConfig(dp_shard=3)
    found = search(settings(PRESETS["300m"], 2, 80, 2), asked, RematConfig())
    assert found.asked is not None and "= 3, but 2 process(es)" in found.asked.problem


@pytest.mark.slow
def test_less_memory_never_fits_more() -> None:
    fitting = [
        len(search(settings(PRESETS["2b"], 8, gib, 8), ParallelConfig(), RematConfig()).fitting)
        for gib in (8, 24, 80)
    ]
    assert fitting == sorted(fitting) and fitting[0] < fitting[-1]


def test_micro_batches_keep_whole_gradients() -> None:
    """Two packs a rank, one after the other: gradients are added up before they are reduced."""
    model = PRESETS["300m"]
    parallel, remat = ParallelConfig(dp_shard=8), RematConfig("full")
    apart = Estimator(settings(model, 8, 80, 16)).memory(parallel, remat).parts
    together = Estimator(settings(model, 8, 80, 16, micro_batches=1)).memory(parallel, remat).parts
    whole = Weights(model).units(1, 8).whole
    assert apart["gradients"] - together["gradients"] == 4 * whole
    assert together["activations"] > 1.5 * apart["activations"]


def test_offloaded_state_lies_on_the_host() -> None:
    estimator = Estimator(settings(PRESETS["2b"], 8, 80, 8))
    parallel = ParallelConfig(dp_shard=8, cpu_offload=True)
    memory = estimator.memory(parallel, RematConfig("full"))
    assert [memory.parts[name] for name in ("parameters", "gradients", "optimizer")] == [0, 0, 0]
    assert memory.host == Weights(PRESETS["2b"]).state(parallel, 4, 1).total


def test_time_and_mfu_follow_the_data_sheet() -> None:
    """Twice the peak and links: half the time of products; MFU is model FLOPs over the peak."""
    made = settings(PRESETS["2b"], 8, 80, 8)
    gpu = made.cluster.gpu
    fast = replace(made.cluster, gpu=replace(gpu, flops_s=2 * gpu.flops_s))
    parallel, remat = ParallelConfig(dp_shard=8), RematConfig("full")
    one = Estimator(made).estimate(parallel, remat)
    two = Estimator(replace(made, cluster=fast)).estimate(parallel, remat)
    assert two.time.parts["products"] == pytest.approx(one.time.parts["products"] / 2)
    model_flops = 3 * made.workload.flops * 8
    assert one.mfu == pytest.approx(model_flops / one.time.step_s / (8 * gpu.flops_s))
    # Everything is computed again: 4 forwards' worth instead of 3, attention 4.5.
    assert 4 / 3 < one.time.hardware_flops / model_flops < 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "H900"}, "--gpu H900: there is A100"),
        ({"num_gpus": 0}, "--gpus 0"),
        ({"memory_gib": 3.0}, "what is reserved must be less"),
        ({"interconnect": "fast"}, "--interconnect fast"),
        ({"interconnect": "-3"}, "--interconnect -3"),
    ],
)
def test_clusters_that_cannot_be(changes: dict[str, object], message: str) -> None:
    facts = {
        "gpu": "H100",
        "num_gpus": 8,
        "memory_gib": 80.0,
        "interconnect": "ndr400",
        "per_node": 8,
        "reserved_gib": 4.0,
    }
    with pytest.raises(ConfigError, match=message) as error:
        build_cluster(**{**facts, **changes})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_collectives_beyond_a_node_are_as_fast_as_its_network() -> None:
    cluster = build_cluster("H100", 64, 80, "20", 8, 4.0)
    assert cluster.bandwidth(8) == pytest.approx(450e9 * 0.75)
    assert cluster.bandwidth(9) == pytest.approx(20e9 * 0.75)


def test_divisors() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]


def test_experts_are_dealt_out_where_there_are_any() -> None:
    """To ranks that divide their number; less of them is held, and rows cross instead."""
    pool = ExpertsConfig(8, 2, 1.0, 1.0)
    model = replace(PRESETS["300m"], experts={"video": pool})
    found = search(settings(model, 16, 80, 16), ParallelConfig(dp_shard=16, ep=8), RematConfig())
    assert {one.parallel.ep for one in found.fitting} == {1, 2, 4, 8}
    assert found.asked is not None and found.asked.estimate is not None
    dealt = found.asked.estimate
    (together,) = (
        one
        for one in found.fitting
        if one.parallel.dp_shard == 16 and one.parallel.ep == 1 and one.remat == dealt.remat
    )
    assert dealt.memory.total < together.memory.total
    assert dealt.time.parts["ep"] > 0 and "ep" not in together.time.parts
    assert {one.axis for one in dealt.traffic} == {"ep", "dp_shard"}
    assert {one.span for one in dealt.traffic if one.axis == "ep"} == {8}
    text = show.plan(settings(model, 16, 80, 16), found, 40)
    assert "of which a token meets" in text and "dp_shard=16,ep=8" in text


def test_experts_that_cannot_be_dealt_out_say_why() -> None:
    dense = settings(PRESETS["300m"], 8, 80, 8)
    found = search(dense, ParallelConfig(ep=2), RematConfig())
    assert {one.parallel.ep for one in found.fitting} == {1}
    assert found.asked is not None and "the model has no experts" in found.asked.problem
    model = replace(PRESETS["300m"], experts={"video": ExpertsConfig(6, 2)})
    found = search(settings(model, 8, 80, 8), ParallelConfig(ep=4), RematConfig())
    assert found.asked is not None and "does not divide the 6 experts" in found.asked.problem
    assert {one.parallel.ep for one in found.fitting} == {1, 2}
