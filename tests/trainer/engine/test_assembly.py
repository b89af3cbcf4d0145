"""What a recipe asks of libraries is in the model that the megatron engine drives."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kinodit.models.attention import attend
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.moe.experts import Experts
from kinodit.models.moe.layer import moe_layers
from kinodit.models.norm import RMSNorm
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.dispatch import TokenDispatch
from kinodit.trainer.engine.megatron.grouped import GroupedExperts
from kinodit.trainer.engine.megatron.te_attention import FusedAttention
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.expert import ExpertExchange
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config
from tests.trainer.engine import test_te, test_te_norm

CPU = torch.device("cpu")
POOLS = {"video": ExpertsConfig(num_experts=4)}


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("", ".pytorch", ".pytorch.attention", ".pytorch.attention.rope")
    package, pytorch, attention, rope = (ModuleType(f"transformer_engine{name}") for name in names)
    pytorch.Linear, pytorch.RMSNorm = test_te.StandIn, test_te_norm.StandIn  # type: ignore[attr-defined]
    for module in (package, pytorch, attention, rope):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def driven(
    rank: int, world_size: int, config: MegatronConfig, parallel: ParallelConfig
) -> nn.Module:
    """The model of an engine for another machine, whose kernels are taken to be there."""
    mesh = build_mesh(parallel, config, world_size, rank, CPU)
    with torch.device("meta"):
        model = MMDiT(tiny_model_config(num_heads=4, experts=POOLS))
    wish = Wish(
        config,
        OptimConfig(),
        parallel,
        PrecisionConfig(compute="bfloat16"),
        RematConfig(),
        world_size,
        elsewhere=True,
    )
    return build_engine(model, initial_values(0), mesh, wish).model


def taken(model: Any) -> dict[str, bool]:
    """Setting -> whether the library's part is in the model."""
    kinds = [type(part) for part in model.modules()]
    norms = [kind for kind in kinds if issubclass(kind, RMSNorm | test_te_norm.StandIn)]
    attention = isinstance(model.attend, partial) and model.attend.keywords.get("within")
    return {
        "linears": any(issubclass(kind, test_te.StandIn) for kind in kinds),
        "attention": isinstance(attention, FusedAttention),
        "norms": all(issubclass(kind, test_te_norm.StandIn) for kind in norms),
        "experts": all(
            isinstance(layer.experts, GroupedExperts) for layer in moe_layers(model).values()
        ),
    }


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("linears", "transformer_engine"),
        ("attention", "transformer_engine"),
        ("norms", "transformer_engine"),
        ("experts", "grouped_gemm"),
    ],
)
def test_a_library_s_part_is_there_if_it_is_asked_for(setting: str, value: str) -> None:
    alone = ParallelConfig(dp_shard=1)
    found = taken(driven(0, 1, MegatronConfig(**{setting: value}), alone))  # type: ignore[arg-type]
    assert found == {name: name == setting for name in found}
    plain: Any = driven(0, 1, MegatronConfig(), alone)
    assert not any(taken(plain).values()) and plain.attend is attend
    assert {type(layer.experts) for layer in moe_layers(plain).values()} == {Experts}


def dispatcher(rank: int, world_size: int, config: MegatronConfig) -> str:
    """Who takes rows to experts."""
    model: Any = driven(rank, world_size, config, ParallelConfig(dp_shard=2, ep=2))
    return type(model.apply_experts).__name__


@pytest.mark.gloo
def test_rows_go_by_the_dispatcher_that_is_asked_for(two: Ranks) -> None:
    for config, kind in (
        (MegatronConfig(), ExpertExchange),
        (MegatronConfig(dispatcher="alltoall"), TokenDispatch),
        (MegatronConfig(dispatcher="flex"), TokenDispatch),
    ):
        assert two.run(dispatcher, config) == [kind.__name__] * 2
