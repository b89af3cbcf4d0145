"""megatron-core's distributed optimizer: its own code on gloo, as exact as every other engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kinodit.launch.plan.measure import squared_error
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.certify.layouts import with_degrees
from kinodit.trainer.certify.trace import trace, whole
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import compare_traces
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron import elsewhere
from kinodit.trainer.engine.megatron.distributed import DistributedEngine
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import synthetic_pack, tiny_model_config

CPU = torch.device("cpu")
CONFIG = MegatronConfig(data_parallel="distributed_optimizer", bucket_numel=2000)
"""Buckets small enough that there are several."""


def layout(**degrees: int) -> ParallelConfig:
    return with_degrees(ParallelConfig(), degrees)


def small_twin() -> Twin:
    return twin(RunConfig(model=tiny_model_config(num_heads=4)))


def assert_as_alone(parallel: ParallelConfig, config: MegatronConfig, ranks: Ranks) -> None:
    small = small_twin()
    found = ranks.run(trace, small, parallel, "float64", 0, False, "cpu", config)
    verdict = compare_traces(trace(0, 1, small, layout()), found)
    assert verdict.ok, verdict.faults


@pytest.mark.gloo
def test_it_trains_as_one_process_does(four: Ranks) -> None:
    """tp ranks with the same tokens have places in their group that they have not in a pack."""
    assert_as_alone(layout(dp_shard=2, tp=2), replace(CONFIG, sequence_parallel=False), four)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, overlap=False), replace(CONFIG, bucket_numel=0, micro_batches=1)],
    ids=["overlapped", "in turns", "one bucket"],
)
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(
    "parallel",
    [
        layout(dp_shard=4),
        layout(dp_shard=2, tp=2),
        layout(cp=2, tp=2),
        layout(dp_shard=2, cp=2, ring=2),
    ],
    ids=str,
)
def test_layouts_train_as_one_process_does(
    parallel: ParallelConfig, sequence_parallel: bool, config: MegatronConfig, four: Ranks
) -> None:
    assert_as_alone(parallel, replace(config, sequence_parallel=sequence_parallel), four)


def engine_of(
    rank: int, world_size: int, config: MegatronConfig, precision: PrecisionConfig
) -> DistributedEngine:
    parallel = ParallelConfig(dp_shard=world_size)
    mesh = build_mesh(parallel, config, world_size, rank, CPU)
    with torch.device("meta"):
        model = MMDiT(tiny_model_config(num_heads=4))
    wish = Wish(config, OptimConfig(), parallel, precision, RematConfig(), world_size)
    engine = build_engine(model, initial_values(0), mesh, wish)
    assert isinstance(engine, DistributedEngine)
    return engine


def steps(rank: int, world_size: int, config: MegatronConfig, compute: str) -> dict[str, Any]:
    """Of two updates, with a skipped step between: what was sent when, and what came of it."""
    engine = engine_of(rank, world_size, config, PrecisionConfig(compute=compute))  # type: ignore[arg-type]
    start = {n: whole(x) for n, x in engine.canonical(engine.masters()).items()}
    groups = engine._parallel.bucket_groups
    early: list[int] = []

    finish = engine._parallel.finish_grad_sync

    def watched() -> None:
        early.append(sum(group.grad_reduce_handle is not None for group in groups))
        finish()

    engine._parallel.finish_grad_sync = watched
    for number in range(3):
        pack = synthetic_pack(number, [2 * rank, 2 * rank + 1], torch.float32)
        engine.forward_backward(pack, squared_error, last=False)
        engine.forward_backward(pack, squared_error, last=True)
        if number == 1:
            engine.skip()
        else:
            engine.clip(1.0)
            engine.step(1e-2)
    with engine.inference() as forward:
        prediction = forward(synthetic_pack(0, [7], torch.float32))["video"]
    masters = {n: whole(x) for n, x in engine.canonical(engine.masters()).items()}
    model = {n: p.detach().float().numpy().copy() for n, p in engine.model.named_parameters()}
    return {
        "buckets": len(groups),
        "early": early,
        "start": start,
        "masters": masters,
        "model": model,
        "dtypes": {p.dtype for p in engine.model.parameters()},
        "prediction": prediction.float().numpy().copy(),
    }


@pytest.mark.slow
@pytest.mark.gloo
def test_messages_overlap_and_change_nothing(two: Ranks) -> None:
    """From the second step on every bucket is on its way before the backward has ended."""
    found = two.run(steps, CONFIG, "float32")
    in_turns = two.run(steps, replace(CONFIG, overlap=False), "float32")
    for one, other in zip(found, in_turns, strict=True):
        assert one["buckets"] > 3 and other["buckets"] == 1
        assert one["early"] == [0, one["buckets"], one["buckets"]]
        assert other["early"] == [0, 0, 0]
        np.testing.assert_allclose(one["prediction"], other["prediction"], rtol=1e-4, atol=1e-6)
        for name, values in one["masters"].items():
            np.testing.assert_array_equal(values, found[0]["masters"][name])
            np.testing.assert_array_equal(values, one["model"].get(name, values))
        assert any((one["masters"][n] != x).any() for n, x in one["start"].items())


@pytest.mark.gloo
def test_masters_are_exact_where_the_model_computes_in_bfloat16(two: Ranks) -> None:
    for one in two.run(steps, CONFIG, "bfloat16"):
        assert one["dtypes"] == {torch.bfloat16}
        for name, values in one["model"].items():
            exact = initial_values(0)(name, values.shape).numpy()
            np.testing.assert_array_equal(one["start"][name], exact)
            rounded = torch.from_numpy(one["masters"][name]).bfloat16().float().numpy()
            np.testing.assert_array_equal(values, rounded)


def test_one_process_has_nothing_to_share() -> None:
    mesh = build_mesh(ParallelConfig(dp_shard=1), CONFIG, 1, 0, CPU)
    with torch.device("meta"):
        model = MMDiT(tiny_model_config(num_heads=4))
    plain = ParallelConfig(), PrecisionConfig(), RematConfig()
    engine = build_engine(model, initial_values(0), mesh, Wish(CONFIG, OptimConfig(), *plain))
    assert isinstance(engine, NativeEngine)


def test_on_cuda_nothing_is_answered_for() -> None:
    """megatron-core's own names reach torch, but for float64, which it does not know."""
    with elsewhere.named_as_cuda(torch.device("cuda"), torch.float32):
        assert torch.zeros(1).type() == "torch.FloatTensor"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.tensor([0.0], device="cuda")
    with elsewhere.named_as_cuda(CPU, torch.float32):
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, device="cuda").device == CPU
        assert torch.zeros(1, device=torch.cuda.current_device()).device == CPU
        assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"
