"""Settings of sharding do what they say: what is gathered when, in which format, and how often.

Seen by one of two ranks whose collectives are pretended: what they would send is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.engine.base import Predictions
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel import shard
from kinodit.trainer.parallel.apply import PrecisionConfig, model_blocks, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.traffic import Traffic
from tests.support.synthetic import synthetic_pack, tiny_model_config

CONFIG = tiny_model_config(num_double_blocks=2, num_single_blocks=2)
NUM_BLOCKS = 4
PLAIN = PrecisionConfig()


@pytest.fixture(autouse=True)
def _two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def engine_of(parallel: ParallelConfig, precision: PrecisionConfig = PLAIN) -> NativeEngine:
    mesh = build_mesh(parallel, 2, 0, torch.device("cpu"))
    model = MMDiT(CONFIG)
    initialize(model, seed=1)
    parallelize(model, mesh, parallel, precision, RematConfig(), compile_blocks=False)
    return NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, precision)


@dataclass
class Sent:
    """Messages and bytes of gathering and of reducing."""

    gathers: int
    gathered: int
    reductions: int
    reduced: int


def sent(
    parallel: ParallelConfig, precision: PrecisionConfig = PLAIN, micro_batches: int = 1
) -> Sent:
    engine = engine_of(parallel, precision)

    def loss(predictions: Predictions) -> torch.Tensor:
        return predictions["video"].square().sum()

    with Traffic() as traffic:
        for number in range(micro_batches):
            batch = synthetic_pack(number, [1, 2], torch.float32)
            engine.forward_backward(batch, loss, last=number == micro_batches - 1)
    messages, num_bytes = traffic.messages, traffic.num_bytes
    gather, reduction = ("fsdp", "all_gather"), ("fsdp", "reduce_scatter")
    return Sent(messages[gather], num_bytes[gather], messages[reduction], num_bytes[reduction])


def test_resharded_blocks_are_gathered_again_for_the_backward() -> None:
    freed, kept = (sent(ParallelConfig(reshard_after_forward=reshard)) for reshard in (True, False))
    # The last block stays for its backward, as does what is outside the blocks, one unit more.
    assert freed.gathers == 2 * NUM_BLOCKS - 1 + 1
    assert kept.gathers == NUM_BLOCKS + 1
    assert freed.reductions == kept.reductions == NUM_BLOCKS + 1


def test_formats_of_what_is_sent() -> None:
    plain = sent(ParallelConfig())
    computed = sent(ParallelConfig(), PrecisionConfig(compute="bfloat16"))
    both = sent(ParallelConfig(), PrecisionConfig(compute="bfloat16", reduce="bfloat16"))
    assert computed.gathered * 2 == both.gathered * 2 == plain.gathered
    assert computed.reduced == both.reduced * 2 == plain.reduced


def test_gradients_are_reduced_once_a_step() -> None:
    once, thrice = (sent(ParallelConfig(), micro_batches=count) for count in (1, 3))
    assert thrice.reductions == once.reductions
    assert thrice.reduced == once.reduced
    # Replicas sum what is left of the shards, once as well.
    engine = engine_of(ParallelConfig(dp_replicate=2))
    with Traffic() as traffic:
        for last in (False, True):
            engine.forward_backward(
                synthetic_pack(0, [1], torch.float32),
                lambda predictions: predictions["video"].square().sum(),
                last=last,
            )
    assert traffic.total("hsdp")[0] == NUM_BLOCKS + 1


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_blocks_gather_those_that_come_next(num_ahead: int) -> None:
    model = engine_of(ParallelConfig(prefetch=num_ahead)).model
    states = [cast(FSDPModule, block)._get_fsdp_state() for block in model_blocks(model)]
    for index, state in enumerate(states):
        assert state._states_to_forward_prefetch == states[index + 1 : index + 1 + num_ahead]
        before = states[max(0, index - num_ahead) : index]
        assert state._states_to_backward_prefetch == before[::-1]


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_every_unit_is_offloaded_or_none(cpu_offload: bool) -> None:
    policies: list[Any] = []
    real: Any = getattr(shard, "fully_shard")  # noqa: B009 - mypy knows what it exports

    def recording(module: Any, **settings: Any) -> Any:
        policies.append(settings.pop("offload_policy", None))
        return real(module, **settings)

    mesh = build_mesh(ParallelConfig(), 2, 0, torch.device("cpu"))
    assert mesh.device_mesh is not None
    model = MMDiT(CONFIG)
    parallel = ParallelConfig(cpu_offload=cpu_offload)
    with patch.object(shard, "fully_shard", recording):
        shard.shard(
            model, mesh.device_mesh, model_blocks(model), torch.float32, torch.float32, parallel
        )
    assert [isinstance(policy, CPUOffloadPolicy) for policy in policies] == [cpu_offload] * (
        NUM_BLOCKS + 1
    )
