"""Experts that ranks have between them, under ZeRO: beside what tests/parity says of the loss."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import pytest

from kinodit.trainer.certify.trace import trace
from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.engine.deepspeed.experts import gather_in_one_order
from kinodit.trainer.engine.refusals import is_missing
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.parity.test_experts import MODEL, check, twin_of
from tests.support.ranks import Ranks
from tests.trainer.engine.test_zero import backward, engine_of, life

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(is_missing("deepspeed"), reason="needs the extra deepspeed"),
]
PAIR = ParallelConfig(dp_shard=2, ep=2)
TWICE = ParallelConfig(dp_shard=4, ep=2)
DISK = tempfile.gettempdir()
ON_DISK: dict[str, Any] = {"offload_optimizer": "nvme", "nvme_path": DISK}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [PAIR, TWICE], ids=["one", "two"])
@pytest.mark.parametrize(
    "config",
    [
        DeepSpeedConfig(stage=1),
        DeepSpeedConfig(stage=2),
        DeepSpeedConfig(stage=3),
        DeepSpeedConfig(stage=1, offload_optimizer="cpu"),
        DeepSpeedConfig(stage=2, offload_optimizer="cpu"),
        DeepSpeedConfig(stage=3, offload_optimizer="cpu", offload_params="cpu"),
        DeepSpeedConfig(stage=2, **ON_DISK),
        DeepSpeedConfig(stage=3, offload_params="nvme", **ON_DISK),
    ],
    ids=["zero1", "zero2", "zero3", "offload1", "offload2", "offload3", "disk2", "disk3"],
)
def test_skipped_steps_leave_no_trace_and_loaded_state_goes_on_bit_equal(
    config: DeepSpeedConfig, parallel: ParallelConfig, groups: dict[int, Ranks]
) -> None:
    groups[parallel.dp_shard].run(life, twin_of(MODEL), config, parallel)


def under(rank: int, world_size: int, config: DeepSpeedConfig, remat: str) -> Any:
    return trace(rank, world_size, twin_of(MODEL, remat), TWICE, engine_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", "selective"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {"reduce_bucket_size": 1000, "round_robin_gradients": True}),
        (2, {"reduce_bucket_size": 3000, "use_multi_rank_bucket_allreduce": False}),
        (2, {"overlap_comm": True, "allgather_bucket_size": 1000}),
        (3, {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000}),
        (3, {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}),
        (3, {"stage3_prefetch_bucket_size": 2000, "reduce_bucket_size": 1000}),
    ],
)
def test_sizes_of_messages_change_nothing(
    stage: int, settings: dict[str, Any], remat: str, groups: dict[int, Ranks]
) -> None:
    expected = trace(0, 1, twin_of(MODEL), ParallelConfig(dp_shard=1))
    config = DeepSpeedConfig(stage=stage, extra={"zero_optimization": settings})
    for found in groups[4].run(under, config, remat):
        check(found, expected)


def test_gathers_begin_in_one_order_whatever_the_addresses_are() -> None:
    begun: list[list[int]] = []

    def gather(parameters: list[Any], quantize: bool) -> bool:
        begun.append([one.ds_id for one in parameters])
        return quantize

    made: list[Any] = [SimpleNamespace(ds_id=at, all_gather_coalesced=gather) for at in range(3)]
    gather_in_one_order(made)
    assert made[2].all_gather_coalesced([made[2], made[0], made[1]], quantize=True)
    assert not made[0].all_gather_coalesced([made[1], made[0], made[2]], quantize=False)
    assert begun == [[0, 1, 2]] * 2


def beside_another(rank: int, world_size: int) -> None:
    """Trains on, while an engine of another layout is built and trains."""
    twin = twin_of(MODEL)
    for stage in (2, 3):
        config = DeepSpeedConfig(stage=stage)
        first = engine_of(twin, rank, world_size, config, PAIR)
        second = engine_of(twin, rank, world_size, config, ParallelConfig(dp_shard=2))
        for engine in (first, second):
            backward(engine, twin, 0)
        assert float(first.clip(1.0)) == pytest.approx(float(second.clip(1.0)), rel=1e-5)


@pytest.mark.slow
def test_an_engine_keeps_its_groups_beside_others(two: Ranks) -> None:
    two.run(beside_another)
