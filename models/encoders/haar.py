"""The Haar transform of blocks of pixels, level by level, and its inverse.

At each level the axes that have that many levels are halved into sums and differences over
sqrt(2); the part that is low in all of them goes on to the next level. Orthonormal.

Shape legend: blocks [t, h, w, st, sh, sw, 3] (a grid of blocks, then the pixels of one block);
coefficients [t, h, w, B, 3], coarse to fine, B = st sh sw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
FIRST_PIXEL_AXIS = 3


class Subband(NamedTuple):
    """One subband: its level (1 is the finest), the axes it is high in, its pixels in a block."""

    level: int
    high: str
    shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        """For instance "1/tw": finest level, change in time and along a row; "low": the rest."""
        return f"{self.level}/{self.high}" if self.high else "low"

    @property
    def size(self) -> int:
        """Coefficients per block and colour."""
        return math.prod(self.shape)


def subbands(
    temporal_levels: int, spatial_levels: int, together: bool = True
) -> tuple[Subband, ...]:
    """The subbands in the order of the coefficients: the low one, then coarse to fine."""
    shape = [2**temporal_levels, 2**spatial_levels, 2**spatial_levels]
    details: list[list[Subband]] = []
    for level, axes in _levels(temporal_levels, spatial_levels, together):
        shape = [n // 2 if "thw"[axis] in axes else n for axis, n in enumerate(shape)]
        size = (shape[0], shape[1], shape[2])
        details.append([Subband(level, high, size) for high in _combinations(axes) if high])
    low = Subband(len(details), "", (shape[0], shape[1], shape[2]))
    return (low, *(band for level in reversed(details) for band in level))


def forward(
    blocks: Tensor, temporal_levels: int, spatial_levels: int, together: bool = True
) -> Tensor:
    """Blocks [t, h, w, st, sh, sw, 3] to coefficients [t, h, w, B, 3]."""
    details: list[list[Tensor]] = []
    low = blocks
    for _, axes in _levels(temporal_levels, spatial_levels, together):
        parts = {"": low}
        for letter in axes:
            axis = FIRST_PIXEL_AXIS + "thw".index(letter)
            halves: dict[str, Tensor] = {}
            for name, part in parts.items():
                even, odd = torch.unflatten(part, axis, (-1, 2)).unbind(axis + 1)
                halves[name] = (even + odd) * SQRT_HALF
                halves[name + letter] = (even - odd) * SQRT_HALF
            parts = halves
        low = parts.pop("")
        details.append([parts[high] for high in _combinations(axes) if high])
    bands = [low, *(band for level in reversed(details) for band in level)]
    return torch.cat([band.flatten(3, 5) for band in bands], dim=3)


def inverse(
    coefficients: Tensor, temporal_levels: int, spatial_levels: int, together: bool = True
) -> Tensor:
    """Coefficients [t, h, w, B, 3] to blocks [t, h, w, st, sh, sw, 3]."""
    bands = subbands(temporal_levels, spatial_levels, together)
    split = torch.split(coefficients, [band.size for band in bands], dim=3)
    found = {
        band.name: torch.unflatten(part, 3, band.shape)
        for band, part in zip(bands, split, strict=True)
    }
    low = found["low"]
    for level, axes in reversed(list(_levels(temporal_levels, spatial_levels, together))):
        parts = {high: found[f"{level}/{high}"] for high in _combinations(axes) if high}
        parts[""] = low
        for letter in reversed(axes):
            axis = FIRST_PIXEL_AXIS + "thw".index(letter)
            merged: dict[str, Tensor] = {}
            for name in [name for name in parts if letter not in name]:
                total, difference = parts[name], parts[name + letter]
                even = (total + difference) * SQRT_HALF
                odd = (total - difference) * SQRT_HALF
                merged[name] = torch.stack([even, odd], axis + 1).flatten(axis, axis + 1)
            parts = merged
        low = parts[""]
    return low


def _levels(temporal_levels: int, spatial_levels: int, together: bool) -> Iterator[tuple[int, str]]:
    """Each level, finest first, with the letters of the axes that it halves.

    `together` halves time with rows and columns; otherwise time comes after all of them, so that
    change in time is told apart at the coarsest picture only.
    """
    if not together:
        yield from ((level, "hw") for level in range(1, spatial_levels + 1))
        yield from ((spatial_levels + level, "t") for level in range(1, temporal_levels + 1))
        return
    for level in range(1, max(temporal_levels, spatial_levels) + 1):
        temporal = "t" if level <= temporal_levels else ""
        yield level, temporal + ("hw" if level <= spatial_levels else "")


def _combinations(axes: str) -> list[str]:
    """Every choice of letters out of `axes`, in their order: "", "t", "h", "th", ..."""
    chosen = [""]
    for letter in axes:
        chosen += [name + letter for name in chosen]
    return chosen
