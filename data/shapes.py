"""Which size each sample is decoded to when it keeps its own: all arithmetic on whole numbers.

Shape legend: T frames, H rows, W columns of pixels; n samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from kinodit.data.config import DecodeConfig
from kinodit.data.record import MODALITIES
from kinodit.models.errors import ConfigError

Shape = tuple[int, int, int]
"""Frames, rows and columns that a sample is decoded to."""

FPS_SCALE = 1000
VIDEO, IMAGE, AUDIO = range(len(MODALITIES))


@dataclass(frozen=True)
class Grid:
    """How pixels become tokens.

    lengths: (T, layers of tokens) of every length that a clip may have, ascending
    tile:    (rows, columns) of pixels in one token
    sides:   (rows, columns) of pixels that sides are a multiple of; tiles divide them
    """

    lengths: tuple[tuple[int, int], ...]
    tile: tuple[int, int]
    sides: tuple[int, int]

    @property
    def takes_images(self) -> bool:
        """Whether a clip may be one frame."""
        return bool(self.lengths) and self.lengths[0][0] == 1

    def tokens(self, shape: Shape) -> int:
        """Tokens of a clip of `shape`, which fits."""
        frames, height, width = shape
        return dict(self.lengths)[frames] * (height // self.tile[0]) * (width // self.tile[1])


def grid_of(
    layers: Callable[[int], int | None],
    num_frames: int,
    tile: tuple[int, int],
    lengths: Sequence[int] = (),
    side_multiple: int = 1,
) -> Grid:
    """The grid of a codec.

    Args:
        layers: the layers of tokens of T frames; None: the codec or the patch takes no such clip.
        num_frames: of the longest clip.
        tile: pixels of a token, rows and columns.
        lengths: those that clips may have; empty: all that the codec takes.
        side_multiple: sides are a multiple of this, too.
    """
    found = [(frames, layers(frames)) for frames in lengths or range(1, num_frames + 1)]
    for frames, count in found:
        if lengths and (not count or frames > num_frames):
            raise ConfigError(
                f"data.lengths has {frames}, which is no length that the codec and the patch take "
                f"up to data.num_frames={num_frames}"
            )
    rows, columns = (math.lcm(side, side_multiple) for side in tile)
    taken = tuple((frames, count) for frames, count in sorted(found) if count)
    return Grid(taken, tile, (rows, columns))


def frames_at(
    num_frames: NDArray[np.int64], fps_milli: NDArray[np.int64], fps: float
) -> NDArray[np.int64]:
    """[n] how many frames at `fps` a source of `num_frames` at `fps_milli` / 1000 has.

    Frame j is on screen at j / fps: the last is the largest j with floor(j * rate / fps) within.
    """
    rate = Fraction(str(fps)) * FPS_SCALE
    product = num_frames * rate.numerator
    found: NDArray[np.int64] = -(-product // np.maximum(fps_milli * rate.denominator, 1))
    return found


def native_shapes(
    modality: NDArray[np.integer],
    num_frames: NDArray[np.int64],
    fps_milli: NDArray[np.int64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    config: DecodeConfig,
    grid: Grid,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What samples are decoded to when they keep their aspect ratio and length.

    A picture is scaled to at most `config.height * config.width` pixels, never enlarged, and its
    sides are cut to whole multiples, at least one. A clip has the frames that its source has at
    `config.fps`, at most `config.num_frames`, cut to a length that the codec takes.

    Returns:
        shapes [n, 3]; frames are 0 where a clip is too short for any length, and all is 0 for a
        sound. And [n], the frames that each source has at `config.fps`.
    """
    area = config.height * config.width
    # Rounding cannot differ between machines: one square root and one division in float64.
    scale = np.minimum(1.0, np.sqrt(area / np.maximum(height * width, 1)))
    rows = np.maximum((height * scale).astype(np.int64) // grid.sides[0], 1) * grid.sides[0]
    columns = np.maximum((width * scale).astype(np.int64) // grid.sides[1], 1) * grid.sides[1]
    there = frames_at(num_frames, fps_milli, config.fps)
    allowed = np.array([0, *(frames for frames, _ in grid.lengths)], dtype=np.int64)
    most = np.minimum(there, config.num_frames)
    length = allowed[np.searchsorted(allowed, most, side="right") - 1]
    length = np.where(modality == IMAGE, 1 if grid.takes_images else 0, length)
    shapes = np.stack([length, rows, columns], axis=1)
    shapes[modality == AUDIO] = 0
    return shapes, there
