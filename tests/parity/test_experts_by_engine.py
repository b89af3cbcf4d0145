"""Experts under every engine: the loss, gradients, parameters and corrections of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kinodit.trainer.certify.engines import ENGINES, can_have
from kinodit.trainer.certify.layouts import layout_name
from kinodit.trainer.certify.trace import Trace, trace
from kinodit.trainer.engine.config import DeepSpeedConfig, EngineConfig
from kinodit.trainer.engine.refusals import is_missing
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.parity.test_experts import AMONG_SAMPLES, MODEL, check, size_of, twin_of
from tests.support.quick import quick
from tests.support.ranks import Ranks

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(
        any(is_missing(name) for name in ("deepspeed", "megatron")),
        reason="needs the extras deepspeed and megatron",
    ),
]
SHARDED = ParallelConfig(dp_shard=2)
SPLIT = ParallelConfig(dp_shard=1, tp=2)
AROUND = ParallelConfig(dp_shard=1, cp=2)
BOTH = ParallelConfig(dp_shard=2, tp=2)
BOTH_SHARED = ParallelConfig(dp_shard=1, cp=2, tp=2)
DEALT = [
    ("megatron", ParallelConfig(dp_shard=2, ep=2)),
    ("megatron", ParallelConfig(dp_shard=2, tp=2, ep=2)),
    ("megatron", ParallelConfig(dp_replicate=2, dp_shard=2, ep=2)),
    ("megatron-no-sp", ParallelConfig(dp_shard=1, cp=2, tp=2, ep=2)),
    ("megatron-alltoall", ParallelConfig(dp_shard=2, ep=2)),
    ("megatron-alltoall-no-sp", ParallelConfig(dp_shard=2, tp=2, ep=2)),
]
# A dispatcher sends rows to experts of other ranks.
DISPATCHING = {"megatron-alltoall", "megatron-alltoall-no-sp"}
# One rank or two with the same experts; neighbours by tp, or by the pack that they share.
ZERO_DEALT = [
    (name, parallel)
    for name in ENGINES
    if name.startswith("zero")
    for parallel in (
        ParallelConfig(dp_shard=2, ep=2),
        ParallelConfig(dp_shard=4, ep=2),
        ParallelConfig(dp_shard=2, tp=2, ep=2),
        ParallelConfig(dp_shard=2, cp=2, ep=2),
        ParallelConfig(dp_shard=1, cp=2, ep=2),
        ParallelConfig(dp_shard=2, cp=2, ring=2, ep=4),
    )
]
FEW = [
    ("megatron-no-sp", SPLIT),
    DEALT[0],
    ("zero3", ParallelConfig(dp_shard=4, ep=2)),
]
GRID = [
    (name, parallel)
    for name in ENGINES
    if name != "native" and name not in DISPATCHING
    for parallel in (SHARDED, SPLIT, AROUND, BOTH)
]


def named(engine: str, parallel: ParallelConfig) -> str:
    return f"{engine} {layout_name(parallel)}"


@pytest.fixture(scope="module")
def reference() -> Trace:
    return trace(0, 1, twin_of(MODEL), ParallelConfig(dp_shard=1))


def under(
    rank: int, world_size: int, parallel: ParallelConfig, engine: EngineConfig, remat: str
) -> Trace:
    return trace(rank, world_size, twin_of(MODEL, remat), parallel, engine_config=engine)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        *(pytest.param(*case, id=named(*case)) for case in FEW),
        *(
            pytest.param(*case, marks=pytest.mark.slow, id=named(*case))
            for case in [*GRID, *DEALT, *ZERO_DEALT]
            if case not in FEW
        ),
    ],
)
def test_engine(
    name: str, parallel: ParallelConfig, groups: dict[int, Ranks], reference: Trace
) -> None:
    """With routing so skewed that some experts get no token in the second step."""
    for found in groups[size_of(parallel)].run(under, parallel, ENGINES[name], "none"):
        check(found, reference)


def among_samples(
    rank: int, world_size: int, parallel: ParallelConfig, engine: EngineConfig
) -> Trace:
    return trace(rank, world_size, twin_of(AMONG_SAMPLES), parallel, engine_config=engine)


@pytest.mark.parametrize(
    ("name", "parallel"),
    quick([("megatron-no-sp", SPLIT), ("megatron-no-sp", BOTH_SHARED), ("zero2", AROUND)]),
)
def test_choices_among_the_tokens_of_a_sample(
    name: str, parallel: ParallelConfig, groups: dict[int, Ranks]
) -> None:
    expected = trace(0, 1, twin_of(AMONG_SAMPLES), ParallelConfig(dp_shard=1))
    for found in groups[size_of(parallel)].run(among_samples, parallel, ENGINES[name]):
        check(found, expected)


@pytest.mark.parametrize("remat", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_experts_that_stage_3_gathers_are_gathered_again(
    remat: str, groups: dict[int, Ranks], reference: Trace
) -> None:
    """Nothing is so small here that it stays: DeepSpeed keeps small parameters whole by default."""
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engine = DeepSpeedConfig(stage=3, extra=extra)
    for found in groups[2].run(under, SHARDED, engine, remat):
        check(found, reference)


@pytest.mark.slow
def test_what_stage_3_gathers_is_no_part_of_what_selective_recomputation_counts(
    groups: dict[int, Ranks], reference: Trace
) -> None:
    """Small parameters are gathered once and stay, so that they are not gathered again."""
    for found in groups[2].run(under, SHARDED, DeepSpeedConfig(stage=3), "selective"):
        check(found, reference)


def in_bfloat16(rank: int, world_size: int) -> Trace:
    return trace(
        rank,
        world_size,
        twin_of(MODEL),
        SHARDED,
        "bfloat16",
        engine_config=DeepSpeedConfig(stage=2),
    )


def test_corrections_keep_their_precision_in_bfloat16(groups: dict[int, Ranks]) -> None:
    """DeepSpeed casts whatever is in the model; corrections move by less than bfloat16 can say."""
    for found in groups[2].run(in_bfloat16):
        loads = [value for name, value in found.parameters.items() if name.endswith(".load")]
        assert loads
        assert any(abs(float(x) * 256 - round(float(x) * 256)) > 1e-3 for v in loads for x in v)


def test_certificates_have_rows_of_every_engine_and_of_ep_where_no_buffer_is_shared() -> None:
    config = twin_of(MODEL).config
    lacking = {name for name, e in ENGINES.items() if not can_have(e, SHARDED, config)}
    assert lacking == DISPATCHING
    dealt = replace(SHARDED, ep=2)
    assert {name for name, e in ENGINES.items() if not can_have(e, dealt, config)} == {
        "megatron-distributed",
        "megatron-distributed-no-sp",
    }
