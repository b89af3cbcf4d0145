"""Features of clips, pictures and sounds that need no weights.

Where there is which colour, how it changes, and which pitches are heard when: they tell sets apart
whose colours, motion or sounds differ, and know nothing of what is shown.

Shape legend: T frames, H rows, W columns; A channels, N samples; D features.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kinodit.models.encoders.base import SoundFormat
from kinodit.models.encoders.mel import MelConfig
from kinodit.trainer.evaluation.distance import Features

CELLS = 4
"""Rows and columns of the picture's cells."""
NUM_BANDS, NUM_TIMES = 12, 8
"""Mel bands, and equal parts of a sound."""


def picture_features(video: Tensor) -> Features:
    """[D] of the middle frame of uint8 [T, H, W, 3]: mean and deviation of each cell's colours."""
    frame = _cells(video[len(video) // 2 : len(video) // 2 + 1])
    mean, square = frame.mean(-1), frame.square().mean(-1)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean.flatten(), deviation.flatten()]).numpy()


def video_features(video: Tensor) -> Features:
    """[D] of uint8 [T, H, W, 3], T > 1: what each cell's mean colour does.

    Its mean over time, how it changes from the first third to the last, and from frame to frame.
    """
    cells = _cells(video).mean(-1)
    third = max(1, len(cells) // 3)
    parts = [
        cells.mean(0),
        cells[-third:].mean(0) - cells[:third].mean(0),
        (cells[1:] - cells[:-1]).abs().mean(0),
    ]
    return torch.cat([part.flatten() for part in parts]).numpy()


def sound_features(sound: Tensor, rate_hz: int) -> Features:
    """[D] of float32 [A, N]: mean and deviation of mel bands' levels (in 0 to 1) in each part.

    Windows are short enough that a tone which is on and off some times a second differs from a
    steady one: in most parts by its deviation alone.
    """
    window = 1 << (max(4, rate_hz // 20) - 1).bit_length()
    hop = min(window // 4, max(1, sound.shape[1] // (4 * NUM_TIMES)))
    config = MelConfig(hop=hop, window=window, num_bands=NUM_BANDS, floor_db=-70.0)
    codec = config.build(torch.device("cpu"), SoundFormat(rate_hz, 1))
    mono = sound.mean(0, keepdim=True)[:, : hop * (sound.shape[1] // hop)]
    level = (codec.encode(mono)[:, :, 0, 0].to(torch.float64) + 1) / 2
    edges = np.linspace(0, level.shape[1], NUM_TIMES + 1).round().astype(int)
    pairs = pairwise(edges.tolist())
    parts = [level[:, low : max(high, low + 1)] for low, high in pairs]
    means = [part.mean(1) for part in parts]
    deviations = [part.std(1, correction=0) for part in parts]
    return torch.cat([*means, *deviations]).numpy()


def _cells(video: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] to float64 [T, CELLS, CELLS, 3, pixels], in 0 to 1; edges are cut off."""
    height, width = (side // CELLS for side in video.shape[1:3])
    cut = video[:, : height * CELLS, : width * CELLS].to(torch.float64) / 255
    cells = cut.reshape(len(video), CELLS, height, CELLS, width, 3)
    return cells.permute(0, 1, 3, 5, 2, 4).flatten(4)
