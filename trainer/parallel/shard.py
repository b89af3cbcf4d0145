"""FSDP2 over the data-parallel axes: DDP, FSDP and HSDP are degrees of one mesh.

DDP is HSDP with a shard axis of size 1: torch's DistributedDataParallel regroups its buckets after
the first step, which changes the order of summation and with it the last bits of a resumed run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    model: nn.Module,
    device_mesh: DeviceMesh,
    blocks: list[nn.Module],
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard `model` in place: each of `blocks`, then the rest, is one unit of communication.

    Gradients are reduced by SUM, never averaged: the loss is already divided by counts of the
    whole step. (A divide factor of 1 alone selects an operation that gloo lacks.)
    """
    # Blocks hand on views of one joint tensor; nothing writes into a block's output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # The engine casts what goes in. Blocks also take tables that must keep their precision.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(
            block,
            mesh=device_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(model, mesh=device_mesh, mp_policy=policy)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters.

    A forward without backward leaves the outermost unit gathered, where it would hide later
    changes of the shards (an average swapped out, a checkpoint loaded).
    """
    for unit in units(model):
        unit.reshard()


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The units of communication inside `model`, outermost first."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients (the last micro-batch) or accumulates locally."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(enabled)
        model.set_requires_gradient_sync(enabled)
