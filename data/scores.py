"""What can be measured of a clip: shot cuts, motion, sharpness, silence.

Shape legend: T frames, H rows, W columns; luma is float32 in [0, 1], sound float32 in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError, codec_of, open_medium, within_limit
from kinodit.data.ocr import TextDetector
from kinodit.data.record import Record
from kinodit.data.shots import ShotFinder, Shots, shot_finder
from kinodit.data.sound import resampled

Array = NDArray[np.float32]

SMALL_SIDE = 64
"""Longer side of the pictures that cuts and motion are measured on, pixels."""
BLOCK, REACH = 8, 8
"""Sides of a block and farthest displacement that is looked for, pixels of those pictures."""
MOTION_FPS = 6.0
STILLNESS = 0.004
"""How much better a displacement must match than none, per pixel: noise is no motion."""
CLARITY_SIDE = 256
CLARITY_FPS = 1.0
TEXT_EVERY_S = 2.0
SILENCE_DBFS = -50.0
SILENCE_WINDOW_S = 0.02
SOUND_RATE = 16_000


@dataclass(frozen=True)
class Measured:
    """scores: name -> number, for the record; cuts_s: where shots begin, seconds."""

    scores: dict[str, float]
    cuts_s: tuple[float, ...] = ()


def measure(
    record: Record,
    limits: DecodeConfig,
    detector: TextDetector | None = None,
    shots: Shots = "own",
) -> Measured:
    """The scores of a medium, of those that it can have.

    motion:  how fast parts of the picture move, mean over blocks and time, in longer sides a second
    cuts:    shot cuts; clips of one shot have none
    clarity: sharpness: variance of the Laplacian of luma, the median over frames, at a longer side
             of 256 pixels at most
    silence: share of the sound that is below -50 dBFS, in windows of 20 ms
    ocr:     largest share of a frame that is text, if there is a `detector`

    `limits` are those of decoding; `shots` says by what cuts are found.

    Raises:
        DecodeError: the medium is damaged, or above the limits.
        MissingExtraError: what finds cuts is not installed.
    """
    scores: dict[str, float] = {}
    cuts: tuple[float, ...] = ()
    if record.meta.modality != "audio":
        pictures = _Pictures(detector, shot_finder(shots))
        with open_medium(record, limits) as container:
            if not container.streams.video:
                raise DecodeError("there is no picture in it")
            stream = container.streams.video[0]
            codec_of(stream).thread_count = 1
            for frame in within_limit(container.decode(stream), limits):
                pictures.add(frame)
        if not pictures.times_s:
            raise DecodeError("not one frame of it can be decoded")
        scores["clarity"] = float(np.median(pictures.clarities))
        if detector is not None:
            scores["ocr"] = max(pictures.text_shares)
        if record.meta.modality == "video":
            found = pictures.finder.cuts()
            cuts = tuple(pictures.times_s[place] for place in found)
            scores["cuts"] = float(len(cuts))
            scores["motion"] = pictures.motion(set(found))
    if record.meta.modality == "audio" or record.meta.has_audio:
        silent = _silence(record, limits)
        if silent is not None:
            scores["silence"] = silent
    return Measured(scores, cuts)


class _Pictures:
    """Takes frames one after the other and keeps what the measures need of them."""

    def __init__(self, detector: TextDetector | None, finder: ShotFinder) -> None:
        from av.video.reformatter import VideoReformatter

        self.finder = finder
        self._detector = detector
        self._reformatter = VideoReformatter()
        self._last: Array | None = None
        self._sparse: list[tuple[int, float, Array]] = []
        self._next_clarity_s = self._next_text_s = -math.inf
        self.times_s: list[float] = []
        self.clarities: list[float] = []
        self.text_shares: list[float] = []

    def add(self, frame: Any) -> None:
        """A frame, as it is decoded."""
        if frame.pts is None and self.times_s:
            raise DecodeError("its frames have no time stamps")
        time_s = float((frame.pts or 0) * (frame.time_base or Fraction(0)))
        small = self._luma(frame, SMALL_SIDE)
        if self._last is not None and self._last.shape != small.shape:
            raise DecodeError("its frames change their size on the way")
        change = 0.0 if self._last is None else float(np.abs(small - self._last).mean())
        number = len(self.times_s)
        if not self._sparse or time_s - self._sparse[-1][1] >= 1 / MOTION_FPS - 1e-6:
            self._sparse.append((number, time_s, small))
        if time_s >= self._next_clarity_s:
            self.clarities.append(clarity(self._luma(frame, CLARITY_SIDE)))
            self._next_clarity_s = time_s + 1 / CLARITY_FPS
        if self._detector is not None and time_s >= self._next_text_s:
            self.text_shares.append(self._detector.share(frame.to_ndarray(format="rgb24")))
            self._next_text_s = time_s + TEXT_EVERY_S
        self.times_s.append(time_s)
        self.finder.add(frame, change)
        self._last = small

    def motion(self, cuts: set[int]) -> float:
        """Longer sides a second; pairs of frames with a cut between them do not count."""
        speeds = []
        for (first, start_s, one), (last, end_s, other) in zip(
            self._sparse, self._sparse[1:], strict=False
        ):
            if end_s > start_s and cuts.isdisjoint(range(first + 1, last + 1)):
                speeds.append(displacement(one, other) / max(one.shape) / (end_s - start_s))
        return float(np.mean(speeds)) if speeds else 0.0

    def _luma(self, frame: Any, side: int) -> Array:
        """[H, W] of which the longer side is `side`, or the frame's own if that is shorter."""
        scale = min(1.0, side / max(frame.width, frame.height))
        height = max(BLOCK, round(frame.height * scale))
        width = max(BLOCK, round(frame.width * scale))
        picture = self._reformatter.reformat(
            frame, width=width, height=height, format="gray", interpolation="AREA", threads=1
        )
        plane = picture.planes[0]
        pixels = np.ndarray(
            (height, width), np.uint8, memoryview(plane), strides=(plane.line_size, 1)
        )
        return pixels.astype(np.float32) / np.float32(255)


def displacement(one: Array, other: Array) -> float:
    """Mean displacement of the blocks of `one`, [H, W], in `other`, pixels.

    Full search by the sum of absolute differences, refined by parabolas between pixels. Blocks that
    match nowhere better than where they are have none: flat ones do not move.
    """
    rows, columns = one.shape[0] // BLOCK, one.shape[1] // BLOCK
    height, width = rows * BLOCK, columns * BLOCK
    base = one[:height, :width]
    padded = np.pad(other[:height, :width], REACH, mode="edge")
    size = 2 * REACH + 1
    costs = np.empty((size, size, rows, columns), np.float32)
    for down in range(size):
        for right in range(size):
            moved = padded[down : down + height, right : right + width]
            blocks = np.abs(base - moved).reshape(rows, BLOCK, columns, BLOCK)
            costs[down, right] = blocks.mean(axis=(1, 3))
    flat = costs.reshape(size * size, rows, columns)
    best = flat.argmin(axis=0)
    stays = flat[REACH * size + REACH]
    chosen = np.take_along_axis(flat, best[None], axis=0)[0]
    moves = stays - chosen > STILLNESS
    down, right = best // size, best % size
    grid = np.indices((rows, columns))
    vertical = down - REACH + _refined(costs, down, right, grid, 0)
    sideways = right - REACH + _refined(costs, down, right, grid, 1)
    return float(np.where(moves, np.hypot(vertical, sideways), 0.0).mean())


def _refined(
    costs: Array, down: NDArray[Any], right: NDArray[Any], grid: NDArray[Any], axis: int
) -> Array:
    """[rows, columns] the offset from the best whole displacement to the parabola's least."""
    size = costs.shape[0]

    def at(step: int) -> Array:
        moved = [down, right]
        moved[axis] = np.clip(moved[axis] + step, 0, size - 1)
        found: Array = costs[moved[0], moved[1], grid[0], grid[1]]
        return found

    before, here, after = at(-1), at(0), at(1)
    bend = before - 2 * here + after
    safe = np.where(bend > 1e-9, bend, np.inf)
    offset: Array = np.clip((before - after) / (2 * safe), -0.5, 0.5)
    return offset


def clarity(luma: Array) -> float:
    """Variance of the Laplacian (4 neighbours) of luma [H, W]."""
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return float(laplacian.var())


def silence(windows: Iterator[Array]) -> float | None:
    """Share of the windows, [samples] each, that are silent; None if there are none."""
    floor = 10 ** (SILENCE_DBFS / 20)
    silent = [float(np.sqrt(np.square(window).mean())) < floor for window in windows]
    return sum(silent) / len(silent) if silent else None


def _silence(record: Record, limits: DecodeConfig) -> float | None:
    import av

    def windows() -> Iterator[Array]:
        length = round(SOUND_RATE * SILENCE_WINDOW_S)
        held = np.zeros(0, np.float32)
        for frame in within_limit(_sound_frames(container, resampler), limits):
            held = np.concatenate([held, frame.to_ndarray().reshape(-1).astype(np.float32)])
            whole = len(held) // length * length
            yield from held[:whole].reshape(-1, length)
            held = held[whole:]

    with open_medium(record, limits) as container:
        if not container.streams.audio:
            return None
        codec_of(container.streams.audio[0]).thread_count = 1
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SOUND_RATE)
        return silence(windows())


def _sound_frames(container: Any, resampler: Any) -> Iterator[Any]:
    for frame in container.decode(container.streams.audio[0]):
        yield from resampled(resampler, frame)
    yield from resampled(resampler, None)
