"""A model under ZeRO, put together: laid out, filled module by module, partitioned, driven."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.engine.deepspeed.driver import driver_class
from kinodit.trainer.engine.deepspeed.engine import ZeroEngine
from kinodit.trainer.engine.deepspeed.experts import (
    Dealt,
    apart,
    gather_in_one_order,
    mark,
    name_groups,
    register,
    shells_of,
)
from kinodit.trainer.engine.deepspeed.files import Files
from kinodit.trainer.engine.deepspeed.library import (
    keep_gathers_outside,
    leave_empty_modules,
    load,
    partition_group,
    tell_groups,
    tell_of_routers,
)
from kinodit.trainer.engine.deepspeed.partitions import (
    SplitGroups,
    SplitParameters,
    partitions_of,
)
from kinodit.trainer.engine.partitioned import MOMENTS, allocate, own_buffers
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.engine.zero_config import zero_config
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.optim.base import group_parameters
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
    files = Files(settings.nvme_path) if settings.nvme_path else None
    library = load(mesh.device)
    mpu = tell_groups(mesh, settings.hpz)
    dealt = Dealt.of(mesh)
    if dealt is not None:
        register(dealt)
    told = zero_config(settings, wish.precision)
    config = _checked(library, told, mpu)
    group = partition_group(mesh)
    whole = copy.deepcopy(model)
    parallelize(whole, mesh, wish.parallel, wish.precision, wish.remat, compile_blocks=False)
    shells = shells_of(whole, group, dealt)
    unsharded = replace(mesh, device_mesh=None)
    parallelize(model, unsharded, wish.parallel, wish.precision, wish.remat, compile_blocks=False)
    if settings.stage == 3:
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import groups

        nearby = groups._get_zero_param_intra_parallel_group() if settings.hpz > 1 else None
        for part in _parts(model):
            # DeepSpeed takes them as they are, whatever dtype it is told.
            own_buffers(part, mesh.device)
            allocate(part, mesh.device, wish.precision.compute_dtype)
            if dealt is not None:
                mark(part, dealt, settings.stage)
            Init(
                module=part,
                data_parallel_group=group,
                config_dict_or_path=told,
                dtype=wish.precision.compute_dtype,
                mpu=mpu,
                zero_param_parallel_group=nearby,
            )
        tell_of_routers(model)
        if dealt is not None:
            gather_in_one_order(model.parameters())
    else:
        own_buffers(model, mesh.device)
        allocate(model, mesh.device, wish.precision.params_dtype)
        if dealt is not None:
            mark(model, dealt, settings.stage)
    optimizer = _optimizer(wish.optim, model, dealt)
    engine = driver_class(library, wish.precision.params_dtype)(
        args=None,
        model=model,
        optimizer=optimizer.adamw,
        mpu=mpu,
        config=told,
        config_class=config,
        dist_init_required=False,
    )
    own_buffers(model, mesh.device, wish.precision.params_dtype)
    if settings.stage == 3:
        leave_empty_modules(model)
        if wish.remat.mode == "selective":
            keep_gathers_outside(model_blocks(model))
    partitions = partitions_of(engine, model)
    if files is not None:
        _put_in(files, partitions, optimizer, settings)
    zero = ZeroEngine(engine, model, optimizer, partitions, shells, mesh, wish.precision)
    zero.start_from(values)
    return zero


def _optimizer(config: OptimConfig, model: nn.Module, dealt: Dealt | None) -> AdamW:
    """As `build_optimizer`, with experts that are dealt out in groups of their own."""
    assert config.name == "adamw", "refused before"
    groups = group_parameters(config, model.named_parameters())
    if dealt is None:
        return AdamW(groups, config)
    optimizer = AdamW(apart(groups, model), config)
    name_groups(optimizer.adamw.param_groups, model, dealt)
    return optimizer


def _checked(library: Any, told: dict[str, Any], mpu: Any) -> Any:
    """DeepSpeed's own reading of what it is told.

    Raises:
        ConfigError: it does not know a key, or not such a value.
    """
    from pydantic import ValidationError

    try:
        return library.DeepSpeedConfig(told, mpu)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigError(
            f"engine.extra: DeepSpeed {library.__version__} does not take it: {faults}"
        ) from None


def _put_in(
    files: Files,
    partitions: SplitGroups | SplitParameters,
    optimizer: AdamW,
    settings: DeepSpeedConfig,
) -> None:
    """Move what is offloaded to a disk there, before anybody has written to it."""
    if settings.offload_optimizer == "nvme":
        partitions.put_in(files)
        for master in partitions.masters().values():
            state = optimizer.initialised(master)
            for moment in MOMENTS:
                state[moment] = files.zeros_like(master.data)
    if settings.offload_params == "nvme":
        assert isinstance(partitions, SplitParameters), "refused before"
        partitions.put_parameters_in(files)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks one by one, then everything: memory for what is not in a block, at last."""
    yield from model_blocks(model)
    yield model
