"""FSDP2 over the data-parallel axes: DDP, FSDP and HSDP are degrees of one mesh.

DDP is HSDP with a shard axis of size 1: torch's DistributedDataParallel regroups its buckets after
the first step, which changes the order of summation and with it the last bits of a resumed run.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kinodit.trainer.parallel.mesh import Mesh


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
    # Tensors split over two axes are put together in two messages; it happens for certificates.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
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


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def global_norm(tensors: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """The 2-norm of all `tensors` together, a scalar. Collective, one message.

    What several ranks hold alike counts once: its square is divided by their number.
    """
    norms = torch._foreach_norm([local_part(tensor) for tensor in tensors])
    squares = torch._foreach_mul(norms, norms)
    if mesh.world_size > 1:
        squares = torch._foreach_div(squares, [_num_copies(tensor) for tensor in tensors])
    return mesh.sum(torch.stack(squares).sum()).sqrt()


def _num_copies(tensor: Tensor) -> int:
    """Ranks that hold each element of a DTensor."""
    assert isinstance(tensor, DTensor), "a gradient that is not sharded in a run of several ranks"
    axes = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(axis) for axis, x in axes if x.is_replicate())


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients (the last micro-batch) or accumulates locally."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(enabled)
        model.set_requires_gradient_sync(enabled)
