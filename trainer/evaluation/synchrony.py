"""Does a clip click when its ball bounces? Read back from pixels and samples.

For clips as `kinodit.data.demo.bounce` has them: one thing with a colour before grey, which touches
a floor again and again, and a click each time.

Shape legend: T frames, H rows, W columns; A channels, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

COLOURED = 0.35
"""Share of the clip's strongest colour that makes a pixel the ball's."""
LOUD = 0.25
"""Share of the loudest moment that makes a click."""
WINDOW_S, APART_S = 0.008, 0.15
"""Over which a sound's energy is taken; least time from one click to the next."""
MARGIN_FRAMES = 2.0
"""At both ends of a clip: what happens there may not be seen, and is not asked for."""


@dataclass(frozen=True)
class Events:
    """When a clip's ball bounces and when it clicks, seconds; of a clip of that length and rate."""

    bounces_s: Times
    clicks_s: Times
    length_s: float
    frame_s: float


def events_of(
    video: NDArray[np.uint8], fps: float, sound: NDArray[np.float32], rate_hz: int
) -> Events:
    """Bounces of uint8 [T, H, W, 3], T > 2, and clicks of its sound [A, N]."""
    return Events(bounces_s(video, fps), clicks_s(sound, rate_hz), len(video) / fps, 1 / fps)


def bounces_s(video: NDArray[np.uint8], fps: float) -> Times:
    """When the ball of uint8 [T, H, W, 3] is lowest, to a part of a frame; in the lower half only.

    Between two frames it is where two lines of the steeper slope meet: a ball comes down as fast
    as it goes up again.
    """
    rows = _rows(video.astype(np.float64))
    if not np.isfinite(rows).any():
        return np.empty(0)
    middle = (np.nanmin(rows) + np.nanmax(rows)) / 2
    found = []
    for frame in range(1, len(rows) - 1):
        before, here, after = rows[frame - 1 : frame + 2]
        # A frame without a ball is NaN, which is neither above nor below.
        if not (here > middle and here >= before and here > after):
            continue
        steep = here - min(before, after)
        found.append((frame + (after - before) / (2 * steep)) / fps)
    return np.array(found)


def clicks_s(sound: NDArray[np.float32], rate_hz: int) -> Times:
    """When [A, N] is loudest within `APART_S` around, wherever that is loud at all."""
    width = max(1, round(WINDOW_S * rate_hz))
    power = np.square(sound.astype(np.float64)).sum(axis=0)
    energy = np.convolve(power, np.ones(width) / width, mode="same")
    left, found = energy.copy(), []
    reach = round(APART_S * rate_hz)
    while left.max() > LOUD**2 * energy.max():
        at = int(left.argmax())
        found.append(at / rate_hz)
        left[max(0, at - reach) : at + reach] = 0
    return np.sort(np.array(found))


def lags_s(bounces: Events, clicks: Events) -> Times:
    """From each bounce of one clip to the nearest click of another (or the same), and back.

    A bounce without any click, or a click without any bounce, is off by the whole clip: to say
    nothing, or to click all the time, is no way out. Both ends of a clip are left out.
    """
    length_s, margin_s = bounces.length_s, MARGIN_FRAMES * bounces.frame_s
    lags = []
    for events, others in (
        (bounces.bounces_s, clicks.clicks_s),
        (clicks.clicks_s, bounces.bounces_s),
    ):
        asked = events[(events >= margin_s) & (events <= length_s - margin_s)]
        if not len(others):
            lags.append(np.full(len(asked), length_s))
        elif len(asked):
            lags.append(np.abs(asked[:, None] - others).min(axis=1))
    return np.concatenate(lags) if lags else np.empty(0)


def compare_events(clips: Sequence[Events]) -> dict[str, float]:
    """How far bounces and clicks of the same clip are apart, and by chance: of different clips.

    "lag_frames" is the median, "within_a_frame" the share, "events" how many were asked for;
    nothing if none was. A clip without bounces or without clicks counts as one that
    missed; one that has both, but at its ends alone, does not count.
    """
    figures: dict[str, float] = {}
    for name, turn in (("", 0), ("_chance", 1)):
        others = [*clips[turn:], *clips[:turn]]
        lags = [lags_s(ours, theirs) for ours, theirs in zip(clips, others, strict=True)]
        missed = [
            np.array([ours.length_s])
            for one, ours, theirs in zip(lags, clips, others, strict=True)
            if not (len(one) or (len(ours.bounces_s) and len(theirs.clicks_s)))
        ]
        if not sum(map(len, [*lags, *missed])):
            return {}
        frames = np.concatenate([*lags, *missed]) / clips[0].frame_s
        figures[f"lag_frames{name}"] = float(np.median(frames))
        figures[f"within_a_frame{name}"] = float(np.mean(frames <= 1))
        if not name:
            figures["events"] = float(len(frames))
    return figures


def _rows(video: Times) -> Times:
    """[T] row of the ball's centre, NaN where there is none."""
    colour = video.max(axis=3) - video.min(axis=3)
    weight = np.maximum(colour - COLOURED * colour.max(), 0).sum(axis=2)
    total = weight.sum(axis=1)
    seen = total > 0.1 * total.max() if total.max() > 0 else np.zeros(len(total), bool)
    rows = weight @ (np.arange(weight.shape[1]) + 0.5)
    return np.where(seen, rows / np.where(seen, total, 1), np.nan)
