"""A model under ZeRO, put together: laid out, filled module by module, partitioned, driven."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.engine.deepspeed.driver import driver_class
from kinodit.trainer.engine.deepspeed.engine import ZeroEngine
from kinodit.trainer.engine.deepspeed.library import (
    leave_empty_modules,
    load,
    partition_group,
    tell_groups,
    tell_of_routers,
)
from kinodit.trainer.engine.deepspeed.partitions import partitions_of
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.engine.shells import Shells
from kinodit.trainer.engine.zero_config import zero_config
from kinodit.trainer.optim import build_optimizer
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.parallel.apply import model_blocks, parallelize
from kinodit.trainer.parallel.deferred import Values
from kinodit.trainer.parallel.mesh import Mesh


def build(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> Engine:
    """See `build_engine`.

    Masters start from the values in their own precision, whatever the model computes in: DeepSpeed
    would take them from parameters that were rounded to bfloat16 before.
    """
    settings = wish.engine
    assert isinstance(settings, DeepSpeedConfig)
    library = load(mesh.device)
    mpu = tell_groups(mesh, settings.hpz)
    group = partition_group(mesh)
    whole = copy.deepcopy(model)
    parallelize(whole, mesh, wish.parallel, wish.precision, wish.remat, compile_blocks=False)
    shells = Shells.of(whole, group)
    unsharded = replace(mesh, device_mesh=None)
    parallelize(model, unsharded, wish.parallel, wish.precision, wish.remat, compile_blocks=False)
    told = zero_config(settings, wish.precision)
    if settings.stage == 3:
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import groups

        nearby = groups._get_zero_param_intra_parallel_group() if settings.hpz > 1 else None
        for part in _parts(model):
            # DeepSpeed takes them as they are, whatever dtype it is told.
            _allocate(part, mesh.device, wish.precision.compute_dtype)
            Init(
                module=part,
                data_parallel_group=group,
                config_dict_or_path=told,
                dtype=wish.precision.compute_dtype,
                mpu=mpu,
                zero_param_parallel_group=nearby,
            )
        tell_of_routers(model)
    else:
        _allocate(model, mesh.device, wish.precision.params_dtype)
    optimizer = build_optimizer(wish.optim, model)
    assert isinstance(optimizer, AdamW), "refused before"
    engine = driver_class(library, wish.precision.params_dtype)(
        args=None,
        model=model,
        optimizer=optimizer.adamw,
        mpu=mpu,
        config=told,
        config_class=library.DeepSpeedConfig(told, mpu),
        dist_init_required=False,
    )
    _own_buffers(model, mesh.device, wish.precision.params_dtype)
    if settings.stage == 3:
        leave_empty_modules(model)
    num_ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    partitions = partitions_of(engine, model, num_ranks, rank)
    zero = ZeroEngine(engine, model, optimizer, partitions, shells, mesh, wish.precision)
    zero.start_from(values)
    return zero


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks one by one, then everything: memory for what is not in a block, at last."""
    yield from model_blocks(model)
    yield model


def _allocate(part: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters of `part` that are still on the meta device memory for this rank's share.

    What is in it does not matter: `ZeroEngine.start_from` sets all of them.
    """
    _own_buffers(part, device)
    for module in part.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            made = nn.Parameter(
                torch.zeros(own.shape, device=device, dtype=dtype),
                requires_grad=parameter.requires_grad,
            )
            # DeepSpeed counts what is not split over tp once for all tp ranks.
            made.tensor_model_parallel = is_split(parameter)  # type: ignore[attr-defined]
            module.register_parameter(key, made)


def _own_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give buffers memory of their own, in `dtype`: DeepSpeed casts them with the parameters."""
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            made = torch.zeros(buffer.shape, device=device, dtype=dtype or buffer.dtype)
            module.register_buffer(key, made)


def is_split(parameter: Tensor) -> bool:
    """Whether tp ranks have different parts of it."""
    return isinstance(parameter, DTensor) and not parameter.placements[0].is_replicate()
