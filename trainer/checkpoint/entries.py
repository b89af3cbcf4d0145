"""What may go into a checkpoint.

DCP keeps one copy of plain tensors that differ between ranks under one name, without a word. So an
entry is a DTensor, which knows its place; or the same on all ranks; or named for its rank, by the
prefix `rank3/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import CheckpointError

_OF_A_RANK = re.compile(r"rank(\d+)/")


def check_entries(tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Refuse what DCP would lose. Collective.

    Raises:
        CheckpointError: on all ranks; names the entries.
    """
    if mesh.world_size == 1:
        return
    ours = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            continue
        rank = _OF_A_RANK.match(name)
        if rank is None or int(rank[1]) != mesh.rank:
            ours[name] = _digest(tensor)
    every = mesh.gather_objects(ours)
    names = sorted(set().union(*every))
    refused = [
        name
        for name in names
        if _OF_A_RANK.match(name) or len({digests.get(name) for digests in every}) > 1
    ]
    if refused:
        raise CheckpointError(
            f"{', '.join(refused[:3])} {'differs' if len(refused) == 1 else 'differ'} between "
            "ranks under one name, and only one rank's would be kept: make it a DTensor, or name "
            "it rank0/..., rank1/..., each on its rank"
        )


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all entries, whole: what a checkpoint of them takes on disk, nearly."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    raw = data.view(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
    return hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode() + raw).hexdigest()
