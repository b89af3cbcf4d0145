"""A picture that was drawn after reference pictures, beside the real one and beside a copy.

Shape legend: T frames, H rows, W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edited:
    """Mean square differences from the real picture, pixels in 0 to 1.

    error, copy_error: of what was drawn, and of the last reference picture in its place: of an edit
                       the picture before it
    """

    error: float
    copy_error: float


def compare_edit(made: Tensor, real: Tensor, references: Tensor) -> Edited:
    """What was drawn for a sample against the sample.

    made, real: uint8 [T, H, W, 3]
    references: uint8 [R, H, W, 3], at least one
    """
    truth = real.to(torch.float64) / 255

    def error(pixels: Tensor) -> float:
        return float((pixels.to(torch.float64) / 255 - truth).square().mean())

    return Edited(error(made), error(references[-1:]))


def edit_figures(edited: Sequence[Edited]) -> dict[str, float]:
    """Root mean square errors over all samples, in 0 to 1, and the share nearer than a copy.

    "error" beside "copy_error"; nothing without samples.
    """
    if not edited:
        return {}
    num = len(edited)
    return {
        "error": float((sum(one.error for one in edited) / num) ** 0.5),
        "copy_error": float((sum(one.copy_error for one in edited) / num) ** 0.5),
        "nearer_than_copy": sum(one.error < one.copy_error for one in edited) / num,
    }
