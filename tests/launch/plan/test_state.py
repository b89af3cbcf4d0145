"""Bytes of parameters, gradients, optimizer and averages: those of real tensors, to the byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kinodit.launch.plan.activations import MODES
from kinodit.launch.plan.measure import (
    families,
    measure,
    planned_peak,
    planned_state,
    planned_traffic,
)
from kinodit.launch.plan.state import Weights
from kinodit.launch.plan.workload import Workload
from kinodit.models.errors import ConfigError
from kinodit.models.flops import count_parameters
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.presets import PRESETS
from kinodit.trainer.parallel.expert import COUNTS
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.shard import REPLICATE, SHARD
from kinodit.trainer.parallel.tensor import WHOLE
from kinodit.trainer.parallel.volume import Formats
from tests.support.quick import quick
from tests.support.ranks import Ranks

LAYOUTS = [
    ParallelConfig(dp_shard=2),
    ParallelConfig(dp_replicate=2, dp_shard=2),
    ParallelConfig(dp_shard=2, tp=2),
    ParallelConfig(dp_shard=1, cp=4, ring=2),
    ParallelConfig(dp_shard=1, cp=2, tp=2),
]
FAMILIES = families()
DEALT = [
    ParallelConfig(dp_shard=2, ep=2),
    ParallelConfig(dp_shard=4, ep=4),
    ParallelConfig(dp_shard=4, ep=2),
    ParallelConfig(dp_replicate=2, dp_shard=2, ep=2),
    ParallelConfig(dp_shard=1, cp=2, tp=2, ep=2),
]
EVEN = ExpertsConfig(2, 1, 2.0, 1.0, router=RouterConfig("modality"))
"""Experts with even loads, where streams have equally many tokens."""


def size_of(parallel: ParallelConfig) -> int:
    return parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp


def layout_id(parallel: ParallelConfig) -> str:
    parts = ("dp_replicate", "dp_shard", "cp", "ring", "tp", "ep")
    return "-".join(f"{name}{getattr(parallel, name)}" for name in parts)


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    groups = {size: Ranks(size) for size in (2, 4)}
    yield groups
    for group in groups.values():
        group.close()


@pytest.mark.parametrize(
    ("name", "mode"),
    quick(
        itertools.product(FAMILIES, MODES),
        # Each family and each policy twice or more.
        *(
            (name, MODES[(number + more) % len(MODES)])
            for number, name in enumerate(FAMILIES)
            for more in (0, 2)
        ),
    ),
)
def test_one_process_holds_what_was_planned(name: str, mode: str) -> None:
    """State to the byte, activations within 5 %, for each family and policy."""
    workload, remat = FAMILIES[name], RematConfig(mode=mode)  # type: ignore[arg-type]
    parallel = ParallelConfig(dp_shard=1)
    measured = measure(0, 1, workload, parallel, remat)
    assert measured.state == planned_state(workload, parallel, 0)
    assert planned_peak(workload, parallel, remat, 4) == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.gloo
@pytest.mark.parametrize("parallel", quick(LAYOUTS, *LAYOUTS[2:4]), ids=layout_id)
def test_ranks_hold_and_receive_what_was_planned(
    ranks: dict[int, Ranks], parallel: ParallelConfig
) -> None:
    """State and gradients between micro-batches to the byte, messages to the last one."""
    workload, remat = FAMILIES["lora_per_frame"], RematConfig("full")
    size = size_of(parallel)
    found = ranks[size].run(measure, workload, parallel, remat)
    units = Weights(workload.model).units(parallel.tp, parallel.dp_shard * parallel.cp)
    for measured in found:
        assert measured.state == planned_state(workload, parallel, measured.index)
        assert measured.accumulated == 4 * units.whole
    planned = {m.label: m for m in planned_traffic(workload, parallel, remat, Formats(4, 4, 4))}
    for measured in found:
        assert measured.messages == {label: one.count for label, one in planned.items()}
    for label, one in planned.items():
        mean = sum(measured.received[label] for measured in found) / size
        # Tokens do not divide evenly; what is made of parameters does, with its padding.
        exact = label in (SHARD, REPLICATE, WHOLE)
        assert one.nbytes == pytest.approx(mean, rel=1e-9 if exact else 0.01), label


@pytest.mark.gloo
@pytest.mark.parametrize("parallel", quick(DEALT, DEALT[2]), ids=layout_id)
def test_ranks_with_experts_between_them_hold_and_receive_what_was_planned(
    ranks: dict[int, Ranks], parallel: ParallelConfig
) -> None:
    """As above; rows travel by a router that nobody has balanced, so they are only counted."""
    workload, remat = FAMILIES["experts"], RematConfig("full")
    size, num_ranks = size_of(parallel), parallel.dp_shard * parallel.cp
    found = ranks[size].run(measure, workload, parallel, remat)
    units = Weights(workload.model).units(parallel.tp, num_ranks, parallel.ep)
    together = Weights(workload.model).units(parallel.tp, num_ranks)
    assert units.whole < together.whole
    planned = {m.label: m for m in planned_traffic(workload, parallel, remat, Formats(4, 4, 4))}
    for measured in found:
        assert measured.state == planned_state(workload, parallel, measured.index)
        assert measured.accumulated == 4 * units.whole
        assert measured.messages == {label: one.count for label, one in planned.items()}
    for label in planned.keys() & {SHARD, REPLICATE, WHOLE, COUNTS}:
        mean = sum(measured.received[label] for measured in found) / size
        assert planned[label].nbytes == pytest.approx(mean, rel=1e-9), label


def peak(
    rank: int, world_size: int, workload: Workload, parallel: ParallelConfig, mode: str
) -> int:
    return measure(rank, world_size, workload, parallel, RematConfig(mode)).peak  # type: ignore[arg-type]


@pytest.mark.gloo
@pytest.mark.parametrize("mode", quick(["none", "selective", "full"], "selective"))
def test_ranks_with_experts_between_them_hold_the_activations_that_were_planned(
    ranks: dict[int, Ranks], mode: str
) -> None:
    model = replace(FAMILIES["experts"].model, experts={"all": EVEN})
    workload = Workload(model, {"text": 100, "video": 100}, segments=2, packs=8)
    parallel = ParallelConfig(dp_shard=2, ep=2)
    most = max(ranks[2].run(peak, workload, parallel, mode))
    remat = RematConfig(mode)  # type: ignore[arg-type]
    assert planned_peak(workload, parallel, remat, 4) == pytest.approx(most, rel=0.05)
    apart = planned_peak(workload, replace(parallel, ep=1), remat, 4)
    assert planned_peak(workload, parallel, remat, 4) > apart


RINGS = [
    (ring, mode, compute)
    for ring in (2, 4)
    for mode in ("none", "selective", "full")
    for compute in ("bfloat16", "float32")
]


def peaks(
    rank: int, world_size: int, parallel: ParallelConfig, mode: str, compute: str
) -> dict[str, int]:
    remat = RematConfig(mode)  # type: ignore[arg-type]
    return {
        name: measure(rank, world_size, workload, parallel, remat, compute).peak
        for name, workload in FAMILIES.items()
    }


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(("ring", "mode", "compute"), RINGS)
def test_ranks_of_a_ring_hold_the_activations_that_were_planned(
    ranks: dict[int, Ranks], ring: int, mode: str, compute: str
) -> None:
    """The fullest rank within 5 %, for each family."""
    parallel = ParallelConfig(dp_shard=1, cp=ring, ring=ring)
    found = ranks[ring].run(peaks, parallel, mode, compute)
    item = 2 if compute == "bfloat16" else 4
    remat = RematConfig(mode)  # type: ignore[arg-type]
    for name, workload in FAMILIES.items():
        most = max(measured[name] for measured in found)
        planned = planned_peak(workload, parallel, remat, item)
        assert planned == pytest.approx(most, rel=0.05), name


def test_the_largest_shards_are_the_first_rank_s() -> None:
    weights = Weights(FAMILIES["flux"].model)
    states = [weights.state(ParallelConfig(dp_shard=7), 4, 1, rank) for rank in range(7)]
    assert states[0].averages == max(state.averages for state in states)
    whole = weights.state(ParallelConfig(dp_shard=1), 4, 1)
    assert sum(state.averages for state in states) == whole.averages
    assert states[0].parameters * 7 > whole.parameters


@pytest.mark.parametrize("preset", ["14b", "30b"])
def test_a_preset_s_units_are_all_of_it(preset: str) -> None:
    config = PRESETS[preset]
    units = Weights(config).units(1, 1)
    assert units.total == units.whole == count_parameters(config)
    split = Weights(config).units(8, 1)
    assert split.whole == pytest.approx(units.whole / 8, rel=0.002)
    assert split.replicated > 0 and sum(map(sum, split.stored.values())) > 0


def test_a_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp=3"):
        Weights(FAMILIES["flux"].model).local_shapes(3)
