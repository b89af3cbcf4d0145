"""Plans of the megatron engine: bytes and messages of its real ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kinodit.launch.plan.buckets import buckets_messages, buckets_of, buckets_plan
from kinodit.launch.plan.estimate import Estimator, crowd
from kinodit.launch.plan.measure import (
    families,
    measure,
    planned_peak,
    planned_state,
    planned_traffic,
    pretended_pack,
    squared_error,
    storage_bytes,
)
from kinodit.launch.plan.state import State, Weights
from kinodit.models.flops import count_parameters
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.refusals import Wish, is_missing
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import cut
from kinodit.trainer.parallel.shard import SHARD
from kinodit.trainer.parallel.tensor import WHOLE
from kinodit.trainer.parallel.volume import Formats
from tests.launch.plan.test_zero import settings_for
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(is_missing("megatron"), reason="needs the extra megatron")

SP, SAME = MegatronConfig(), MegatronConfig(sequence_parallel=False)
DISTRIBUTED = MegatronConfig(data_parallel="distributed_optimizer", bucket_numel=50_000)
FAMILIES = families()
SLOW = pytest.mark.slow
SPLIT = ParallelConfig(dp_shard=1, tp=2)
SHARED = ParallelConfig(dp_shard=1, cp=2, tp=2)
CASES = [
    ("sd3", SAME, SPLIT, "full"),
    pytest.param("flux", SP, SPLIT, "none", marks=SLOW),
    pytest.param("flux", SP, SPLIT, "full", marks=SLOW),
    pytest.param("flux", SAME, SPLIT, "selective", marks=SLOW),
    pytest.param("gqa", SAME, SPLIT, "none", marks=SLOW),
    pytest.param("lora_per_frame", SAME, SHARED, "full", marks=SLOW),
    pytest.param("experts", SAME, ParallelConfig(dp_shard=2, tp=2), "none", marks=SLOW),
]


@pytest.mark.gloo
@pytest.mark.parametrize(("name", "engine", "parallel", "mode"), CASES, ids=str)
def test_ranks_hold_and_receive_what_was_planned(
    name: str,
    engine: MegatronConfig,
    parallel: ParallelConfig,
    mode: str,
    groups: dict[int, Ranks],
) -> None:
    """State to the byte, messages to the last one, activations within 5 %."""
    workload, remat = FAMILIES[name], RematConfig(mode)  # type: ignore[arg-type]
    size = parallel.dp_shard * parallel.cp * parallel.tp
    found = groups[size].run(measure, workload, parallel, remat, "float32", engine)
    formats = Formats(4, 4, 4)
    planned = {m.label: m for m in planned_traffic(workload, parallel, remat, formats, engine)}
    for measured in found:
        assert measured.state == planned_state(workload, parallel, measured.index)
        assert measured.messages == {label: one.count for label, one in planned.items()}
    for label, one in planned.items():
        mean = sum(measured.received[label] for measured in found) / size
        exact = label in (SHARD, WHOLE)
        assert one.nbytes == pytest.approx(mean, rel=1e-9 if exact else 0.01), label
    peak = planned_peak(workload, parallel, remat, 4, engine)
    assert peak == pytest.approx(max(measured.peak for measured in found), rel=0.05)


@dataclass(frozen=True)
class Held:
    """Bytes of a rank, by what they are for, and its place among those that share them out."""

    state: State
    index: int


def held(
    rank: int, world_size: int, config: MegatronConfig, parallel: ParallelConfig, compute: str
) -> Held:
    """Of a real engine after a backward and an update."""
    precision = PrecisionConfig(compute=compute)  # type: ignore[arg-type]
    workload = FAMILIES["experts"]
    mesh = build_mesh(parallel, config, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(workload.model)
    wish = Wish(config, OptimConfig(), parallel, precision, RematConfig(), world_size)
    engine = build_engine(model, initial_values(0), mesh, wish)
    average = Ema(EmaConfig(), engine)
    batch = pretended_pack(workload)
    if mesh.place.is_cut:
        batch = cut(batch, mesh.place).of(batch)
    engine.forward_backward(batch, squared_error, last=True)
    gradients = storage_bytes(engine.gradient_parts().values())
    engine.step(0.1)
    buffers = [id(buffer) for buffer in model.buffers()]
    masters = [x for x in engine.masters().values() if id(x) not in buffers]
    optimizer = engine._optimizer  # type: ignore[attr-defined]
    state = State(
        storage_bytes([*model.parameters(), *masters]),
        gradients,
        storage_bytes(optimizer.tensors()),
        storage_bytes(average.average.values()),
    )
    return Held(state, rank // parallel.tp)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("config", "parallel", "compute"),
    [
        (DISTRIBUTED, ParallelConfig(dp_shard=2), "bfloat16"),
        pytest.param(
            replace(DISTRIBUTED, overlap=False),
            ParallelConfig(dp_shard=2, tp=2),
            "float32",
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_ranks_of_the_distributed_optimizer_hold_what_was_planned(
    config: MegatronConfig, parallel: ParallelConfig, compute: str, groups: dict[int, Ranks]
) -> None:
    weights = Weights(FAMILIES["experts"].model)
    buckets = buckets_of(weights, config, parallel)
    assert (len(buckets.sizes) > 1) == config.overlap
    formats = Formats(4, 2 if compute == "bfloat16" else 4, 4)
    size = parallel.dp_shard * parallel.cp * parallel.tp
    found = groups[size].run(held, config, parallel, compute)
    for one in found:
        assert one.state == buckets_plan(buckets, weights, formats, 1, one.index).state
    fullest = buckets_plan(buckets, weights, formats, 1).state.total
    assert fullest == max(one.state.total for one in found)


def test_tp_ranks_with_the_same_tokens_share_a_pack_with_others_alone() -> None:
    split, same = (crowd(FAMILIES["flux"], SHARED, copied=copied) for copied in (False, True))
    assert (split.num_shares, same.num_shares) == (4, 2)
    assert split.num_ranks == same.num_ranks == 4
    assert same.own == same.seen == split.seen and same.held == split.held
    assert 2 * split.num_own == same.num_own


def test_it_sends_what_the_paper_says() -> None:
    """Section 7 of ZeRO: twice the parameters a step, here sums in float32, whatever the passes."""
    weights, parallel = Weights(PRESETS["2b"]), ParallelConfig(dp_shard=8)
    buckets = buckets_of(weights, MegatronConfig(), parallel)
    sent = buckets_messages(buckets, parallel, Formats(4, 2, 4))
    numbers = count_parameters(PRESETS["2b"])
    assert sent is not None and sent.nbytes == pytest.approx((4 + 2) * numbers * 7 / 8, rel=1e-3)
    assert sent.count == 2 * len(buckets.sizes) > 2
    assert buckets_messages(buckets, ParallelConfig(dp_shard=1), Formats(4, 2, 4)) is None


def test_layouts_are_planned_as_the_engine_s_own() -> None:
    """Same tokens on tp ranks cost memory; stretches of state save it as ranks are added."""
    parallel, remat = ParallelConfig(dp_shard=2, tp=4), RematConfig("full")
    base = settings_for(SP)
    split, same = (
        Estimator(replace(base, wish=replace(base.wish, engine=engine))).estimate(parallel, remat)  # type: ignore[type-var]
        for engine in (SP, SAME)
    )
    assert same.memory.parts["activations"] > 2 * split.memory.parts["activations"]
    alone = ParallelConfig(dp_shard=8)
    settings = replace(
        base,
        wish=replace(
            base.wish,
            engine=MegatronConfig(  # type: ignore[type-var]
                data_parallel="distributed_optimizer"
            ),
        ),
    )
    estimator = Estimator(settings)
    made, narrow = (estimator.estimate(p, remat) for p in (alone, ParallelConfig(dp_shard=2, tp=4)))
    native = Estimator(base).estimate(alone, remat)
    whole = buckets_of(base.weights, MegatronConfig(), alone).whole
    assert made.memory.parts["gradients"] == 4 * whole
    assert made.memory.parts["optimizer"] == pytest.approx(
        native.memory.parts["optimizer"], rel=0.01
    )
    assert narrow.memory.parts["optimizer"] == pytest.approx(
        made.memory.parts["optimizer"], rel=0.02
    )
    assert {one.label for one in made.traffic} == {SHARD}
