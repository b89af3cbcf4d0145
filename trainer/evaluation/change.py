"""Do sound and picture of a clip change together? For any clips, by features of frames and sounds.

Where a picture changes much from one frame to the next, its sound is expected to change, too: the
shift at which both curves agree best is how far sound and picture are apart. (AV-Align of Yariv et
al., arXiv 2309.16429, compares peaks of optical flow and of loudness in this way.)

Shape legend: n changes from one frame to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kinodit.trainer.evaluation.distance import Features

FLAT = 1e-9
"""Deviation of a curve, as a share of its mean, below which nothing changes at one time more."""


@dataclass(frozen=True)
class Changes:
    """[n] each: by how much what is seen, and what is heard, differs from the frame before."""

    seen: Features
    heard: Features


def lag_frames(seen: Features, heard: Features) -> int | None:
    """Frames by which `heard` [n] comes after `seen` [n], up to half of the clip before or after.

    The shift of greatest correlation, of several the least. None where one of them is flat: what
    stands still, or is silent, has no moment.
    """
    curves = []
    for curve in (seen, heard):
        deviation = float(curve.std())
        if not deviation > FLAT * float(np.abs(curve).mean()):
            return None
        curves.append((curve - curve.mean()) / deviation)
    ours, theirs = curves
    count = len(ours)
    shifts = sorted(range(-(count // 2), count // 2 + 1), key=lambda shift: (abs(shift), shift))

    def agreement(shift: int) -> float:
        low, high = max(0, -shift), min(count, count - shift)
        return float(ours[low:high] @ theirs[low + shift : high + shift])

    return max(shifts, key=agreement)


def compare_changes(clips: Sequence[Changes]) -> dict[str, float]:
    """How far sound and picture are apart in frames, and by chance: with another clip's sound.

    "lag_frames" is the median of the distance, "within_a_frame" the share; a clip that stands
    still or is silent counts as one that is off by all of its frames. Nothing without clips.
    """
    if not clips:
        return {}
    figures: dict[str, float] = {}
    for name, turn in (("", 0), ("_chance", 1)):
        others = [*clips[turn:], *clips[:turn]]
        lags = []
        for ours, theirs in zip(clips, others, strict=True):
            count = min(len(ours.seen), len(theirs.heard))
            lag = lag_frames(ours.seen[:count], theirs.heard[:count])
            lags.append(count + 1 if lag is None else abs(lag))
        figures[f"lag_frames{name}"] = float(np.median(lags))
        figures[f"within_a_frame{name}"] = float(np.mean([lag <= 1 for lag in lags]))
    return figures
