"""Experts put together for sampling, in any layout and engine: what routing gives one process."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.cache import Fused, cached_experts
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import DeepSpeedConfig, EngineConfig, NativeConfig
from kinodit.trainer.engine.refusals import Wish, is_missing
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from tests.parity.test_experts import size_of
from tests.support.ranks import Ranks
from tests.support.synthetic import synthetic_pack, tiny_model_config

NATIVE = NativeConfig()
MODEL = tiny_model_config(
    num_heads=4,
    width=32,
    experts={
        "video": ExpertsConfig(4, 2, 1.0, 0.5, router=RouterConfig("timestep")),
        "text": ExpertsConfig(4, 1, 1.0, blocks=(0,), router=RouterConfig("noise_level")),
    },
)


def sampled(
    rank: int, world_size: int, parallel: ParallelConfig, config: EngineConfig, fuses: bool
) -> tuple[Tensor, int]:
    """A prediction for one sample, whose video tokens have one level, and how many were fused."""
    mesh = build_mesh(parallel, config, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(MODEL)
    wish = Wish(config, OptimConfig(), parallel, PrecisionConfig(), RematConfig(), world_size)
    engine = build_engine(model, initial_values(1), mesh, wish)
    pack = synthetic_pack(0, [1], torch.float32)
    made = 0
    make = Fused.__init__

    def counted(*args: object, **settings: object) -> None:
        nonlocal made
        made += 1
        make(*args, **settings)  # type: ignore[arg-type]

    with mock.patch.object(Fused, "__init__", counted), engine.inference() as forward:
        if not fuses:
            return forward(pack)["video"].clone(), made
        with cached_experts(engine.model):
            first = forward(pack)["video"].clone()
            assert torch.equal(forward(pack)["video"], first)
    return first, made


LAYOUTS = {
    "tp2": (ParallelConfig(dp_shard=1, tp=2), NATIVE),
    "ulysses2": (ParallelConfig(dp_shard=1, cp=2), NATIVE),
    "fsdp2": (ParallelConfig(dp_shard=2), NATIVE),
    "ring2 x tp2": (ParallelConfig(dp_shard=1, cp=2, ring=2, tp=2), NATIVE),
    "zero3": (
        ParallelConfig(dp_shard=2),
        # Nothing is so small here that it stays on every rank.
        DeepSpeedConfig(
            stage=3, extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        ),
    ),
}


@pytest.mark.gloo
@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_are_put_together(name: str, groups: dict[int, Ranks]) -> None:
    parallel, engine = LAYOUTS[name]
    if is_missing(engine.name):
        pytest.skip(f"needs the extra {engine.name}")
    expected, none = sampled(0, 1, ParallelConfig(dp_shard=1), NATIVE, False)
    assert none == 0
    ranks = groups[size_of(parallel)].run(sampled, parallel, engine, True)
    for found, _ in ranks:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # Once for each of the layers, however often the level is met; some rank may have no caption.
    assert {2, 3} >= {made for _, made in ranks} and max(made for _, made in ranks) == 3


@pytest.mark.gloo
def test_experts_that_ranks_have_between_them_are_routed_to(two: Ranks) -> None:
    expected, _ = sampled(0, 1, ParallelConfig(dp_shard=1), NATIVE, False)
    for found, made in two.run(sampled, ParallelConfig(dp_shard=2, ep=2), NATIVE, True):
        assert made == 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
