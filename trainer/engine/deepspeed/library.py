"""DeepSpeed itself, imported in a process that was prepared for it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.remat import keep_hooks_outside


def load(device: torch.device) -> Any:
    """The package, with its communication set up on `device`. Every rank calls it.

    DeepSpeed finds its accelerator and its device in the environment.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed's own calls, by names that torch has given up.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    if device.type == "cpu":
        # An all-reduce for inference alone, which the first start would compile for a minute. A
        # process that is killed meanwhile leaves a lock that every later one waits for.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    return deepspeed


def tell_of_routers(model: nn.Module) -> None:
    """Let stage 3 gather routers for as long as it gathers for the layers around them.

    It finds out when the backward needs a module by what that module returns, and sees tensors
    alone: a router returns more than that.
    """
    from deepspeed import zero

    for layer in moe_layers(model).values():
        for parameter in layer.router.parameters():
            zero.register_external_parameter(layer, parameter)


def leave_empty_modules(model: nn.Module) -> None:
    """Take stage 3's hooks off modules inside `model` that have no parameters to be gathered.

    Each costs as much as those around a matrix, and most of a model's modules are of that kind.
    To be called before anyone else hooks into the model.
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False), *getattr(module, "_external_params", {})]
        if module is not model and not own:
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


def keep_gathers_outside(blocks: Iterable[nn.Module]) -> None:
    """Let stage 3's hooks in blocks be no part of them, for a selective recomputation.

    To be called before anyone else hooks into the model.
    """
    for block in blocks:
        for module in block.modules():
            if module._forward_pre_hooks:
                keep_hooks_outside(module)


@dataclass(frozen=True)
class Mpu:
    """Our process groups by the names that DeepSpeed asks a Megatron-like program for."""

    mesh: Mesh

    def get_model_parallel_group(self) -> ProcessGroup:
        """The tp ranks."""
        assert self.mesh.tp_mesh is not None
        return self.mesh.tp_mesh.get_group()

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        """This one's place among them."""
        return self.get_model_parallel_group().rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_data_parallel_group(self) -> ProcessGroup:
        """The ranks that partition: dp_shard x cp."""
        group = partition_group(self.mesh)
        assert group is not None
        return group

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        """This one's place among them."""
        return self.get_data_parallel_group().rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """All of them, by their numbers in the run."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())


def partition_group(mesh: Mesh) -> ProcessGroup | None:
    """The ranks that ZeRO partitions over; None in a run of one process."""
    return None if mesh.device_mesh is None else mesh.device_mesh.get_group("dp_shard_cp")


def tell_groups(mesh: Mesh, hpz: int) -> Mpu | None:
    """Make DeepSpeed use this mesh's groups, and none that an earlier engine left behind.

    hpz: neighbours that keep a second copy of parameters together
    """
    from deepspeed.utils import groups

    mpu = Mpu(mesh) if mesh.tp_mesh is not None else None
    groups.mpu = mpu
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if hpz > 1:
        groups._create_zero_param_parallel_group(hpz)
    return mpu
