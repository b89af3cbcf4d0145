"""Silent corruption: replicas of the same parameters must hold the same bits.

Ranks along `dp_replicate` hold copies of the same parts, and so does every rank of what is not
sharded. Each rank sums the bits of its parts as integers; equal parts must have equal sums, and
where one of several differs, its rank is the odd one. A sum of integers does not depend on order,
so that there are no false alarms, and any single flipped bit changes it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.parts import local_part
from kinodit.trainer.resilience.errors import CorruptedError

_WORD_BYTES = 8
_LANES = 4
"""Sums per part: of every fourth word, so that a swap of neighbours is seen as well."""


def bit_sums(tensor: Tensor) -> Tensor:
    """[_LANES] int64: sums of this rank's part, read as words of 8 bytes, zeros after its end.

    Sums may wrap.
    """
    held = local_part(tensor).reshape(-1).view(torch.uint8)
    row = _WORD_BYTES * _LANES
    whole = held.numel() // row * row
    first = held if whole == held.numel() else held[:whole]
    # Words are read where a word can begin; the sums are of the bytes alone, wherever they lie.
    if held.storage_offset() % _WORD_BYTES:
        first = first.clone()
    sums = first.view(torch.int64).view(-1, _LANES).sum(0)
    if first.numel() == held.numel():
        return sums
    last = held.new_zeros(row)
    last[: held.numel() - whole] = held[whole:]
    return sums + last.view(torch.int64)


def part_of(tensor: Tensor) -> tuple[int, ...]:
    """Which part of a tensor this rank holds: its place along the axes that the tensor is split."""
    if not isinstance(tensor, DTensor):
        return ()
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    return tuple(
        -1 if placement.is_replicate() else index
        for index, placement in zip(place, tensor.placements, strict=True)
    )


def check_replicas(tensors: Mapping[str, Tensor], mesh: Mesh, step: int) -> None:
    """Compare what ranks hold alike. Collective.

    Raises:
        CorruptedError: copies differ; names the rank that differs from the others, and the tensor.
    """
    if mesh.world_size == 1:
        return
    sums = torch.stack([bit_sums(tensor) for tensor in tensors.values()]).cpu()
    # One number per place first: the sums themselves cross only where something is wrong.
    parts = [part_of(tensor) for tensor in tensors.values()]
    ours = [(part, int(total)) for part, total in zip(parts, _mixed(sums), strict=True)]
    digest: dict[tuple[int, ...], int] = defaultdict(int)
    for part, total in ours:
        digest[part] = (digest[part] * 1_000_003 + total) % 2**61
    gathered = mesh.gather_objects(dict(digest))
    if not mesh.any(bool(differing(gathered))):
        return
    names = list(tensors)
    every = mesh.gather_objects({(*part, index): total for index, (part, total) in enumerate(ours)})
    odd = differing(every)
    ranks = sorted({rank for found in odd.values() for rank in found})
    bad = [names[index] for index in sorted({key[-1] for key in odd})]
    raise CorruptedError(
        f"after step {step} the copies of {len(bad)} tensor(s) differ, first {bad[0]}: "
        f"{_blame(ranks, mesh.world_size)}. The parameters are not saved; the next start goes on "
        "from the last checkpoint. Exclude that node, and have its memory tested"
    )


def _mixed(sums: Tensor) -> Tensor:
    """[N, lanes] -> [N]: one number of each row, to which every lane counts differently."""
    weights = torch.arange(1, 2 * _LANES, 2, dtype=torch.int64)
    return (sums * weights).sum(-1)


def differing(by_rank: Sequence[Mapping[tuple[int, ...], int]]) -> dict[tuple[int, ...], list[int]]:
    """Part -> the ranks whose value is not that of the majority; all of them where there is none.

    `by_rank` holds each rank's parts and their values.
    """
    holders: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for rank, values in enumerate(by_rank):
        for part, value in values.items():
            holders[part][rank] = value
    odd = {}
    for part, held in holders.items():
        counts = Counter(held.values())
        if len(counts) == 1:
            continue
        (usual, most), *others = counts.most_common()
        tie = others[0][1] == most
        odd[part] = [rank for rank, value in held.items() if tie or value != usual]
    return odd


def _blame(ranks: Sequence[int], world_size: int) -> str:
    names = ", ".join(map(str, ranks))
    if len(ranks) == 1:
        return f"rank {names} of {world_size} is the odd one"
    return f"one of the ranks {names} of {world_size} is wrong; with two copies, which is not known"
