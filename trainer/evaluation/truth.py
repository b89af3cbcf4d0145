"""Do clips show what they were told to, and do they sound when it happens? Read back from pixels.

For clips of one thing that moves before a still background, as the demo set's theatre has them.

Shape legend: T frames, H rows, W columns; A channels, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinodit.data.demo.measure import measure_direction
from kinodit.trainer.evaluation.distance import Features

FOREGROUND = 0.3
"""Share of the clip's largest difference from its background that makes a pixel the thing's."""
MOVES, SOUNDS = 0.1, 0.15
"""Shares of the largest change, and of the loudest sample, by which something has begun."""
SHADES = 4
"""Parts of each colour's scale in a histogram."""


@dataclass(frozen=True)
class Told:
    """What a clip was asked to show; "" for what was not said."""

    sprite: str = ""
    direction: str = ""
    action: str = ""


@dataclass(frozen=True)
class Seen:
    """What a clip shows.

    colours:   [SHADES^3] share of the thing's pixels by colour
    colour:    [3] their mean, in 0 to 1
    direction: where it goes
    lag_s:     from the first change to the first sound, seconds; NaN without either
    frame_s:   seconds of a frame
    """

    colours: Features
    colour: Features
    direction: str
    lag_s: float
    frame_s: float


def see(
    video: NDArray[np.uint8], fps: float, sound: NDArray[np.float32] | None, rate_hz: int
) -> Seen:
    """What uint8 [T, H, W, 3], T > 1, shows, with its sound [A, N] if it has one."""
    pixels = video.astype(np.float64) / 255
    difference = np.abs(pixels - np.median(pixels, axis=0)).sum(-1)
    thing = pixels[difference > FOREGROUND * difference.max()]
    thing = thing if len(thing) else pixels.reshape(-1, 3)
    shade = np.minimum((thing * SHADES).astype(int), SHADES - 1)
    index = (shade[:, 0] * SHADES + shade[:, 1]) * SHADES + shade[:, 2]
    colours = np.bincount(index, minlength=SHADES**3) / len(thing)
    lag_s = float("nan")
    if sound is not None:
        lag_s = sound_onset_s(sound, rate_hz) - motion_onset_s(video, fps)
    return Seen(colours, thing.mean(0), measure_direction(video), lag_s, 1 / fps)


def motion_onset_s(video: NDArray[np.uint8], fps: float) -> float:
    """When uint8 [T, H, W, 3] first differs from its first frame, seconds; NaN if it never does."""
    change = np.abs(video.astype(np.float64) - video[0]).mean(axis=(1, 2, 3))
    if change.max() == 0:
        return float("nan")
    return float(np.argmax(change > MOVES * change.max())) / fps


def sound_onset_s(sound: NDArray[np.float32], rate_hz: int) -> float:
    """When [A, N] is first loud, seconds; NaN for silence."""
    loud = np.abs(sound).max(axis=0)
    if loud.max() == 0:
        return float("nan")
    return float(np.argmax(loud > SOUNDS * loud.max())) / rate_hz


def compare(
    told: Sequence[Told], made: Sequence[Seen], real: Sequence[tuple[Told, Seen]]
) -> dict[str, float]:
    """How many clips do as told; beside it what real clips reach, and chance.

    The object is the one whose real clips are nearest by the mean of their colours; the colour
    is off by the root of the mean square distance of the thing's mean colour to that of the real
    clips of its name, and by "colour_other" to those of the others.

    Args:
        told: of each generated clip.
        made: what these show.
        real: clips of the data. One of them is compared with the others alone.
    """
    figures: dict[str, float] = {}
    named = [(t.direction, s.direction) for t, s in zip(told, made, strict=True) if t.direction]
    if named:
        figures["direction"] = _share([a == b for a, b in named])
        known = [(t.direction, s.direction) for t, s in real if t.direction]
        figures["direction_real"] = _share([a == b for a, b in known])
        figures["direction_chance"] = 1 / 4
    figures |= _objects(told, made, real)
    for name, seen in (("", list(made)), ("_real", [s for _, s in real])):
        lags = np.array([s.lag_s / s.frame_s for s in seen if np.isfinite(s.lag_s)])
        if len(lags):
            figures[f"onset_lag_frames{name}"] = float(np.median(np.abs(lags)))
            figures[f"onset_within_a_frame{name}"] = _share(np.abs(lags) <= 1)
    return figures


def _objects(
    told: Sequence[Told], made: Sequence[Seen], real: Sequence[tuple[Told, Seen]]
) -> dict[str, float]:
    by_name: dict[str, list[int]] = {}
    for index, (what, _) in enumerate(real):
        if what.sprite:
            by_name.setdefault(what.sprite, []).append(index)
    if len(by_name) < 2:
        return {}

    def nearest(seen: Seen, left_out: int) -> str:
        distance = {
            name: np.square(
                seen.colours - np.mean([real[i][1].colours for i in rows if i != left_out], axis=0)
            ).sum()
            for name, rows in by_name.items()
            if any(i != left_out for i in rows)
        }
        return min(distance, key=lambda name: (distance[name], name))

    pairs = [(t, s) for t, s in zip(told, made, strict=True) if t.sprite in by_name]
    known = [i for i, (what, _) in enumerate(real) if len(by_name.get(what.sprite, [])) > 1]
    mean = {n: np.mean([real[i][1].colour for i in rows], axis=0) for n, rows in by_name.items()}
    figures = {"object_chance": 1 / len(by_name)}
    if pairs:
        own = [np.square(s.colour - mean[t.sprite]).mean() for t, s in pairs]
        others = [
            np.mean([np.square(s.colour - mean[n]).mean() for n in mean if n != t.sprite])
            for t, s in pairs
        ]
        figures["object"] = _share([nearest(s, -1) == t.sprite for t, s in pairs])
        figures["colour_error"] = float(np.sqrt(np.mean(own)))
        figures["colour_error_other"] = float(np.sqrt(np.mean(others)))
    if known:
        figures["object_real"] = _share(
            [nearest(real[i][1], i) == real[i][0].sprite for i in known]
        )
    return figures


def _share(values: Sequence[bool] | NDArray[np.bool_]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
