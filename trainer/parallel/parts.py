"""What a rank has of a tensor that may be sharded, and all of it out of the parts of all ranks.

DTensor could do each of these by itself. The first time that it meets an operation, it weighs where
inputs and outputs may lie, on a mesh of several axes for seconds: ten for the first step of a model
of a hundred parameters. So what is elementwise is done to the parts, and their places are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def spread(local: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """`local` as this rank's part of a tensor that lies as `like` does. Sends and copies nothing.

    shape: of all of it, where it is not that of `like`
    """
    if not isinstance(like, DTensor):
        return local
    spec = like._spec
    if shape is not None or local.dtype != like.dtype:
        whole = torch.Size(like.shape if shape is None else shape)
        stride = torch.empty(whole, device="meta").stride()
        meta = TensorMeta(whole, stride, local.dtype)
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
    return as_specified(local, spec)


def as_specified(local: Tensor, spec: DTensorSpec) -> Tensor:
    """`local` as this rank's part of the tensor of which a DTensor's `spec` says how it lies."""
    # DTensor.from_local would move it to the mesh's device; parts may be kept on the host.
    made: Tensor = cast(Any, DTensor)(local, spec, requires_grad=False)
    return made


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Collective among the ranks of its mesh."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    mesh, own = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert own is not None and not any(x.is_partial() for x in tensor.placements)
    axes = [axis for axis, x in enumerate(tensor.placements) if not x.is_replicate()]
    shape = torch.empty(tensor.shape, device="meta")
    # Cuts leave the first rank the most.
    most = cut_part(shape, tensor, [0] * mesh.ndim).numel()
    local = local_part(tensor).reshape(-1)
    pieces = F.pad(local, (0, most - local.numel()))
    for axis in reversed(axes):
        gathered = pieces.new_empty(mesh.size(axis) * pieces.numel())
        dist.all_gather_single(gathered, pieces, group=mesh.get_group(axis))
        pieces = gathered
    made = local.new_empty(tensor.shape)
    places = itertools.product(*(range(mesh.size(axis)) for axis in axes))
    for piece, place in zip(pieces.view(-1, most), places, strict=True):
        coordinate = list(own)
        for axis, index in zip(axes, place, strict=True):
            coordinate[axis] = index
        part = cut_part(made, tensor, coordinate)
        part.copy_(piece[: part.numel()].view(part.shape))
    return made


def cut_part(value: Tensor, like: DTensor, coordinate: Sequence[int]) -> Tensor:
    """The part of a whole `value`, a view, that the rank at `coordinate` holds of `like`.

    Matrices are split and experts dealt out first, over tp and ep; FSDP2 then cuts each part into
    equal rows, the last ranks' share being shorter, or nothing.
    """
    mesh = like.device_mesh
    names = mesh.mesh_dim_names or ()
    for axis in sorted(range(mesh.ndim), key=lambda axis: names[axis] not in ("ep", "tp")):
        placement = like.placements[axis]
        if placement.is_replicate():
            continue
        dim, rank = cast(Shard, placement).dim, coordinate[axis]
        size = -(-value.shape[dim] // mesh.size(axis))
        first = min(rank * size, value.shape[dim])
        value = value.narrow(dim, first, min(size, value.shape[dim] - first))
    return value
