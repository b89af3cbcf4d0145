"""The Haar transform of blocks of pixels, level by level, and its inverse.

A level halves axes into sums and differences over sqrt(2). Orthonormal.

Shape legend: blocks [t, h, w, st, sh, sw, 3] (a grid of blocks, then the pixels of one block);
coefficients [t, h, w, B, 3], coarse to fine, B = st sh sw.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
FIRST_PIXEL_AXIS = 3


class Subband(NamedTuple):
    """One subband of a block.

    name:  what is high in it, by level, 1 the finest: "2/hw" within a row and a column at level 2,
           "1/tw" in time and along a row at level 1, "low" the rest; "2/hw@t3" the change in time,
           at level 3, of "2/hw"
    tempo: level of its change in time, 0 for none
    shape: its coefficients in time, height and width
    """

    name: str
    tempo: int
    shape: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Coefficients per block and colour."""
        return math.prod(self.shape)


class Haar(NamedTuple):
    """The transform of blocks of 2^temporal_levels frames of 2^spatial_levels squared pixels.

    `separable` transforms the frames first, in rows and columns, and then every subband in time;
    otherwise each level halves all three axes and only what is low in all of them goes on.
    """

    temporal_levels: int
    spatial_levels: int
    separable: bool = False

    def subbands(self) -> tuple[Subband, ...]:
        """The subbands in the order of the coefficients: coarse to fine."""
        block = (2**self.temporal_levels, 2**self.spatial_levels, 2**self.spatial_levels)
        if not self.separable:
            return _subbands(block, _steps(self.temporal_levels, self.spatial_levels))
        found = []
        for space in _subbands(block, _steps(0, self.spatial_levels)):
            for time in _subbands(space.shape, _steps(self.temporal_levels, 0)):
                name = f"{space.name}@t{time.tempo}" if time.tempo else space.name
                found.append(Subband(name, time.tempo, time.shape))
        return tuple(found)

    def forward(self, blocks: Tensor) -> Tensor:
        """Blocks [t, h, w, st, sh, sw, 3] to coefficients [t, h, w, B, 3]."""
        if self.separable:
            frames = _forward(blocks, _steps(0, self.spatial_levels))
            steps = _steps(self.temporal_levels, 0)
            bands = [part for band in frames for part in _forward(band, steps)]
        else:
            bands = _forward(blocks, _steps(self.temporal_levels, self.spatial_levels))
        return torch.cat([band.flatten(3, 5) for band in bands], dim=3)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Coefficients [t, h, w, B, 3] to blocks [t, h, w, st, sh, sw, 3]."""
        bands = self.subbands()
        split = torch.split(coefficients, [band.size for band in bands], dim=3)
        parts = [
            torch.unflatten(part, 3, band.shape) for band, part in zip(bands, split, strict=True)
        ]
        if not self.separable:
            return _inverse(parts, _steps(self.temporal_levels, self.spatial_levels))
        steps = _steps(self.temporal_levels, 0)
        each = self.temporal_levels + 1
        frames = [_inverse(parts[i : i + each], steps) for i in range(0, len(parts), each)]
        return _inverse(frames, _steps(0, self.spatial_levels))


def _steps(temporal_levels: int, spatial_levels: int) -> list[str]:
    """The letters of the axes that each level halves, finest level first."""
    return [
        ("t" if level < temporal_levels else "") + ("hw" if level < spatial_levels else "")
        for level in range(max(temporal_levels, spatial_levels))
    ]


def _subbands(block: tuple[int, int, int], steps: list[str]) -> tuple[Subband, ...]:
    """The subbands of a block of that shape, the low one first, then coarse to fine."""
    shape = list(block)
    details: list[list[Subband]] = []
    for level, axes in enumerate(steps, start=1):
        shape = [n // 2 if letter in axes else n for letter, n in zip("thw", shape, strict=True)]
        size = (shape[0], shape[1], shape[2])
        details.append(
            [
                Subband(f"{level}/{high}", level if "t" in high else 0, size)
                for high in _combinations(axes)
                if high
            ]
        )
    low = Subband("low", 0, (shape[0], shape[1], shape[2]))
    return (low, *(band for level in reversed(details) for band in level))


def _forward(blocks: Tensor, steps: list[str]) -> list[Tensor]:
    """Blocks [t, h, w, st, sh, sw, 3] to the subbands of `_subbands`, of their shapes."""
    details: list[list[Tensor]] = []
    low = blocks
    for axes in steps:
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
    return [low, *(band for level in reversed(details) for band in level)]


def _inverse(bands: list[Tensor], steps: list[str]) -> Tensor:
    """The subbands of `_forward` to blocks."""
    rest = iter(bands)
    low = next(rest)
    for axes in reversed(steps):
        parts = {high: next(rest) for high in _combinations(axes) if high}
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


def _combinations(axes: str) -> list[str]:
    """Every choice of letters out of `axes`, in their order: "", "t", "h", "th", ..."""
    chosen = [""]
    for letter in axes:
        chosen += [name + letter for name in chosen]
    return chosen
