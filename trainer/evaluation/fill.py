"""What a task fills in, beside a copy of what it is given.

Shape legend: T frames, H rows, W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filled:
    """Squared errors of one clip, pixels in 0 to 1, summed over pixels and colours.

    error, copy_error: of what was generated, and of a copy in its place, over `filled` values
    kept_error, codec_error: of what was given, as the clip shows it and after the codec alone, over
                       `given` values
    """

    error: float
    copy_error: float
    filled: int
    kept_error: float
    codec_error: float
    given: int


def copied(video: Tensor, given: Tensor) -> Tensor:
    """Float64 [T, H, W, 3] in 0 to 1: what uint8 `video` would be if what is given were copied.

    Holes in a frame that is given in part get the mean colour of what is given of it; a frame of
    which nothing is given is the nearest one that is (of two, the one before).

    given: bool [T, H, W], true somewhere
    """
    real = video.to(torch.float64) / 255
    weight = given.to(torch.float64).unsqueeze(-1)
    count = weight.sum(dim=(1, 2), keepdim=True)
    mean = (real * weight).sum(dim=(1, 2), keepdim=True) / count.clamp(min=1)
    frames = torch.where(given.unsqueeze(-1), real, mean)
    known = torch.nonzero(given.any(dim=2).any(dim=1)).squeeze(1)
    distance = (torch.arange(len(video)).unsqueeze(1) - known).abs()
    return frames[known[distance.argmin(dim=1)]]


def compare_fill(made: Tensor, real: Tensor, coded: Tensor, given: Tensor) -> Filled:
    """One clip against the real one whose parts it was given.

    made, real, coded: uint8 [T, H, W, 3]: generated, real, and real after the codec
    given: bool [T, H, W], true somewhere and false somewhere
    """
    truth = real.to(torch.float64) / 255

    def error(video: Tensor, where: Tensor) -> float:
        return float((video - truth).square()[where].sum())

    clip, after_codec = (video.to(torch.float64) / 255 for video in (made, coded))
    return Filled(
        error=error(clip, ~given),
        copy_error=error(copied(real, given), ~given),
        filled=3 * int((~given).sum()),
        kept_error=error(clip, given),
        codec_error=error(after_codec, given),
        given=3 * int(given.sum()),
    )


def fill_figures(clips: Sequence[Filled]) -> dict[str, float]:
    """Root mean square errors over all clips, in 0 to 1, and the share of clips nearer than a copy.

    "fill_error" beside "copy_error", "kept_error" beside "codec_error"; nothing without clips.
    """
    if not clips:
        return {}

    def root(total: float, count: int) -> float:
        return float((total / count) ** 0.5)

    filled, given = sum(c.filled for c in clips), sum(c.given for c in clips)
    return {
        "fill_error": root(sum(c.error for c in clips), filled),
        "copy_error": root(sum(c.copy_error for c in clips), filled),
        "nearer_than_copy": sum(c.error < c.copy_error for c in clips) / len(clips),
        "kept_error": root(sum(c.kept_error for c in clips), given),
        "codec_error": root(sum(c.codec_error for c in clips), given),
    }
