"""Reading the ground truth of a theatre clip back from its pixels.

For judging sampled clips: whoever sampled them was told a direction, and the clip shows one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Direction = Literal["left", "right", "up", "down"]
_NOISE = 0.25
"""Differences below this share of the clip's largest are sensor or sampling noise."""


def motion(video: NDArray[np.uint8]) -> tuple[float, float]:
    """(x, y) in shares of the width and height: how far what differs from the background moves.

    video: uint8 [T, H, W, 3], T >= 2, still camera. The background is the median over time; what
    differs from it is located by its centroid in the first and in the last third of the frames.
    Where the thing covers a pixel for most of the time the median shows the thing: such ghosts are
    in both thirds alike and take from the distance, not from its sign. (0, 0) if nothing moves.
    """
    frames = video.astype(np.float32)
    difference = np.abs(frames - np.median(frames, axis=0)).sum(axis=-1)
    floor = _NOISE * float(difference.max())
    if floor == 0:
        return 0.0, 0.0
    weight = np.maximum(difference - floor, 0)
    third = max(1, len(frames) // 3)
    early, late = _centroid(weight[:third].sum(axis=0)), _centroid(weight[-third:].sum(axis=0))
    return float(late[0] - early[0]), float(late[1] - early[1])


def measure_direction(video: NDArray[np.uint8]) -> Direction:
    """Where the one moving thing of a clip goes. video: uint8 [T, H, W, 3], T >= 2."""
    x, y = motion(video)
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _centroid(weight: NDArray[np.float32]) -> tuple[float, float]:
    """(x, y) in shares of width and height; the middle if nothing has weight."""
    total = float(weight.sum())
    if total == 0:
        return 0.5, 0.5
    height, width = weight.shape
    x = float(weight.sum(axis=0) @ (np.arange(width) + 0.5)) / width
    y = float(weight.sum(axis=1) @ (np.arange(height) + 0.5)) / height
    return x / total, y / total
