"""The one place that picks an engine, and imports its module only then."""

from __future__ import annotations

import importlib
from typing import cast

import torch
from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.config import EngineConfig, MegatronConfig, megatron_part
from kinodit.trainer.engine.refusals import Wish, check_library, check_wish
from kinodit.trainer.parallel import mesh
from kinodit.trainer.parallel.deferred import Values
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig
from kinodit.trainer.parallel.table import table_of


def build_mesh(
    parallel: ParallelConfig,
    engine: EngineConfig,
    world_size: int,
    rank: int,
    device: torch.device,
    collection: object | None = None,
) -> Mesh:
    """The mesh that the engine's process groups make. The process group must exist. Collective.

    collection: a megatron-core `ProcessGroupCollection` of a program that has one; only
                engines that take their groups from megatron-core take it

    Raises:
        ConfigError: degrees and processes do not fit, or the collection does not.
        MissingExtraError: the engine's library is not installed.
    """
    taken = megatron_part(engine)
    if taken is not None:
        check_library(taken.name)
        module = importlib.import_module("kinodit.trainer.engine.megatron")
        made = module.build_mesh(parallel, taken, world_size, rank, device, collection)
        return cast(Mesh, made)
    if collection is not None:
        raise ConfigError(
            f"engine.name={engine.name} makes its own process groups: a ProcessGroupCollection "
            "needs engine.name=megatron, or engine.megatron=true with deepspeed"
        )
    return mesh.build_mesh(parallel, world_size, rank, device)


def build_engine(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> Engine:
    """Lay out `model`, which is on the meta device, give it `values`, and drive it. Collective.

    An engine is the module of its name in this package, with a function `build` that takes the
    same arguments.

    Raises:
        ConfigError: the engine cannot do what is asked, or the model cannot be laid out so.
        MissingExtraError: its library is not installed.
    """
    check_wish(wish)
    taken = megatron_part(wish.engine)
    if taken is not None:
        _take_linears(model, mesh, taken, wish.parallel.tp)
    module = importlib.import_module(f"kinodit.trainer.engine.{wish.engine.name}")
    return cast(Engine, module.build(model, values, mesh, wish))


def _take_linears(model: nn.Module, mesh: Mesh, engine: MegatronConfig, tp: int) -> None:
    """Let megatron-core's linears compute what the model's own would."""
    assert isinstance(model, MMDiT)
    module = importlib.import_module("kinodit.trainer.engine.megatron")
    tp_group = None if mesh.tp_mesh is None else mesh.tp_mesh.get_group()
    use_te = engine.linears == "transformer_engine"
    module.swap_linears(model, table_of(model), tp_group, tp, use_te=use_te)
