"""Whole matrices out of their parts and back, each on one of the ranks that hold its parts.

Ranks that hold one copy of the model among them (dp_shard x cp x tp) take matrices in turns: in a
round each gets the parts of one matrix, works on the whole, and gives the parts back. So the work
is divided, and a rank has one whole matrix at a time. Replicas do the same, each for itself: what
they would save is less than what it costs to talk between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.trainer.parallel.collectives import all_to_all
from kinodit.trainer.parallel.parts import cut_part

LABEL = "matrices"
"""What the messages are for."""

Work = Callable[[Tensor], Tensor]
"""A whole matrix -> another of its shape."""


def on_whole(parts: Sequence[Tensor], like: Sequence[Tensor], work: Work) -> list[Tensor]:
    """This rank's parts of `work(matrix)` for each matrix of which `parts` are this rank's.

    like: the parameters that say how the matrices lie; all DTensors on one mesh, or all plain.
    Collective among ranks that hold parts of the same matrices.
    """
    first = like[0]
    if not isinstance(first, DTensor):
        return [work(part) for part in parts]
    holders = _Holders.of(first)
    made: list[Tensor | None] = [None] * len(parts)
    order = sorted(range(len(parts)), key=lambda index: -like[index].numel())
    for start in range(0, len(order), holders.size):
        turn = order[start : start + holders.size]
        matrices = [like[index] for index in turn]
        wholes = _Turn(holders, [m for m in matrices if isinstance(m, DTensor)])
        for index, part in zip(turn, wholes([parts[index] for index in turn], work), strict=True):
            made[index] = part
    return [part for part in made if part is not None]


@dataclass(frozen=True)
class _Holders:
    """Ranks that hold one copy among them: (rank of all, coordinate in the mesh) of each."""

    places: tuple[tuple[int, tuple[int, ...]], ...]
    own: int

    @property
    def size(self) -> int:
        return len(self.places)

    @classmethod
    def of(cls, parameter: DTensor) -> _Holders:
        mesh = parameter.device_mesh
        coordinate = mesh.get_coordinate()
        assert coordinate is not None and (mesh.mesh_dim_names or ())[0] == "dp_replicate"
        replica = mesh.mesh[coordinate[0]]
        places = tuple(
            (int(replica[tuple(index)]), (coordinate[0], *index))
            for index in torch.ones_like(replica).nonzero().tolist()
        )
        return cls(places, [place for _, place in places].index(tuple(coordinate)))


class _Turn:
    """One matrix for each of the first holders, or fewer."""

    def __init__(self, holders: _Holders, matrices: Sequence[DTensor]) -> None:
        self._holders, self._matrices = holders, matrices
        self._mine = matrices[holders.own] if holders.own < len(matrices) else None

    def __call__(self, parts: Sequence[Tensor], work: Work) -> list[Tensor]:
        """Parts in, parts of what `work` makes of the wholes out."""
        holders, own = self._holders, self._holders.own
        # What several ranks have alike, the first of them sends.
        shapes = [self._shape(matrix, own) for matrix in self._matrices]
        sends = [self._sends(matrix, own) for matrix in self._matrices]
        sizes = [math.prod(shape) for shape in shapes]
        mine, homes = self._mine, range(holders.size)
        in_sizes = [math.prod(self._shape(mine, at)) if mine is not None else 0 for at in homes]
        sent = [mine is not None and self._sends(mine, at) for at in homes]
        flat = [part.reshape(-1) for part, send in zip(parts, sends, strict=True) if send]
        out_counts = [size * send for size, send in zip(sizes, sends, strict=True)]
        in_counts = [size * send for size, send in zip(in_sizes, sent, strict=True)]
        arrived = self._exchange(torch.cat([*flat, parts[0].new_empty(0)]), out_counts, in_counts)
        back = arrived.new_empty(0)
        if mine is not None:
            whole = arrived.new_empty(mine.shape)
            for at, piece in enumerate(arrived.split(in_counts)):
                if sent[at]:
                    part = self._part(whole, mine, at)
                    part.copy_(piece.view_as(part))
            made = work(whole)
            back = torch.cat([self._part(made, mine, at).reshape(-1) for at in homes])
        returned = self._exchange(back, in_sizes, sizes)
        pieces = returned.split(sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _part(self, whole: Tensor, matrix: DTensor, holder: int) -> Tensor:
        return cut_part(whole, matrix, self._holders.places[holder][1])

    def _shape(self, matrix: DTensor, holder: int) -> tuple[int, ...]:
        return tuple(self._part(torch.empty(matrix.shape, device="meta"), matrix, holder).shape)

    def _sends(self, matrix: DTensor, holder: int) -> bool:
        coordinate = self._holders.places[holder][1]
        # Replicas are not among the holders: the first axis says nothing.
        axes = list(zip(matrix.placements, coordinate, strict=True))[1:]
        return all(index == 0 for placement, index in axes if placement.is_replicate())

    def _exchange(self, flat: Tensor, out: Sequence[int], back: Sequence[int]) -> Tensor:
        """`flat`, cut into pieces of `out` for the first holders, for pieces of `back` from all."""
        if self._holders.size == 1:
            return flat
        counts = [[0] * dist.get_world_size() for _ in range(2)]
        for row, sizes in zip(counts, (out, back), strict=True):
            for (rank, _), size in zip(self._holders.places, sizes, strict=False):
                row[rank] = size
        group = dist.group.WORLD
        assert group is not None
        # Holders need not be in the order of their ranks where a mesh was made by someone else.
        assert [rank for rank, _ in self._holders.places] == sorted(
            rank for rank, _ in self._holders.places
        )
        return all_to_all(flat, counts[0], counts[1], group, LABEL)
