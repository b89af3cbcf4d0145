"""FSDP2 over the data-parallel axes: DDP, FSDP and HSDP are degrees of one mesh.

DDP is HSDP with a shard axis of size 1: torch's DistributedDataParallel regroups its buckets after
the first step, which changes the order of summation and with it the last bits of a resumed run.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig
from kinodit.trainer.parallel.parts import local_part
from kinodit.trainer.parallel.remat import keep_hooks_outside
from kinodit.trainer.parallel.traffic import note, others_share

SHARD, REPLICATE = "fsdp", "hsdp"
"""What messages of parameters and gradients are for: inside a replica, and between replicas."""


def shard(
    model: nn.Module,
    device_mesh: DeviceMesh,
    blocks: list[nn.Module],
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    config: ParallelConfig,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard `model` in place: each of `blocks`, then the rest, is one unit of communication.

    Experts that ranks have between them are units of their own, over those ranks of `expert_mesh`
    that have the same ones.

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
    settings: dict[str, Any] = {"mesh": device_mesh, "mp_policy": policy}
    if config.cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy()
    for block in blocks:
        # The backward begins with the last block: freed, it would be gathered again at once.
        frees = config.reshard_after_forward and block is not blocks[-1]
        if expert_mesh is not None:
            over = {**settings, "mesh": expert_mesh["dp_replicate", "dp_shard_cp"]}
            for layer in moe_layers(block).values():
                fully_shard(layer.experts, reshard_after_forward=frees, **over)
                keep_hooks_outside(layer.experts)
        fully_shard(block, reshard_after_forward=frees, **settings)
    fully_shard(model, **settings)
    _prefetch([cast(FSDPModule, block) for block in blocks], config.prefetch)
    num_replicas = device_mesh.size(0)

    def count_sum(gradients: Tensor) -> None:
        note(REPLICATE, "all_reduce", 2 * others_share(gradients, num_replicas))

    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_custom_all_gather(cast(Any, _AllGather()))
        unit.set_custom_reduce_scatter(cast(Any, _ReduceScatter()))
        if num_replicas > 1:
            unit.set_all_reduce_hook(count_sum)


class _Buffers:
    """Memory for a message of FSDP2: plain, as it does by itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Buffers):
    """FSDP2's own, counted."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        note(SHARD, "all_gather", others_share(output_tensor, group.size()))
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Buffers):
    """FSDP2's own, counted."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        note(SHARD, "reduce_scatter", others_share(input_tensor, group.size()))
        return dist.reduce_scatter_single(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )


def _prefetch(blocks: list[FSDPModule], num_ahead: int) -> None:
    """Gather each block's successors while it computes; in the backward, its predecessors."""
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + num_ahead])
        before = blocks[max(0, index - num_ahead) : index]
        block.set_modules_to_backward_prefetch(before[::-1])


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


def global_norm(tensors: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """The 2-norm of all `tensors` together, a scalar on the mesh's device. Collective, one message.

    What several ranks hold alike counts once: its square is divided by their number.
    """
    return mesh.sum(squared_norms(tensors, mesh).sum()).sqrt()


def squared_norms(tensors: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """[n]: this rank's parts of the squared 2-norms of n tensors, on the mesh's device."""
    norms = torch._foreach_norm([local_part(tensor) for tensor in tensors])
    squares = torch._foreach_mul(norms, norms)
    if mesh.world_size > 1:
        squares = torch._foreach_div(squares, [_num_copies(tensor) for tensor in tensors])
    # What is offloaded to the host still crosses between devices.
    return torch.stack(squares).to(mesh.device)


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
