"""Do clips show and sound as they were told to, and when it happens? Read back from pixels.

For clips of one thing that moves before a still background, as the demo set's theatre has them.

Shape legend: T frames, H rows, W columns; A channels, N samples.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kinodit.data.demo.measure import measure_direction
from kinodit.trainer.evaluation.distance import Features
from kinodit.trainer.evaluation.embedded import sound_features
from kinodit.trainer.evaluation.kinds import Answers, Kinds

FOREGROUND = 0.3
"""Share of the clip's largest difference from its background that makes a pixel the thing's."""
MOVES, SOUNDS = 0.1, 0.15
"""Shares of the largest change, and of the loudest sample, by which something has begun."""
SHADES = 5
"""Of each colour in a histogram, evenly from none of it to all."""


@dataclass(frozen=True)
class Told:
    """What a clip was asked to show, and how to sound; "" for what was not said."""

    sprite: str = ""
    direction: str = ""
    action: str = ""
    sound: str = ""


@dataclass(frozen=True)
class Seen:
    """What a clip shows, and how it sounds.

    colours:   [SHADES^3] share of the thing's pixels by colour
    colour:    [3] their mean, in 0 to 1
    direction: where it goes
    lag_s:     from the first change to the first sound, seconds; NaN without either
    frame_s:   seconds of a frame
    levels:    [D] of the sound, as `sound_features` has them; none without a sound
    """

    colours: Features
    colour: Features
    direction: str
    lag_s: float
    frame_s: float
    levels: Features | None = None


def see(
    video: NDArray[np.uint8], fps: float, sound: NDArray[np.float32] | None, rate_hz: int
) -> Seen:
    """What uint8 [T, H, W, 3], T > 1, shows, with its sound [A, N] if it has one."""
    pixels = video.astype(np.float64) / 255
    difference = np.abs(pixels - np.median(pixels, axis=0)).sum(-1)
    thing = pixels[difference > FOREGROUND * difference.max()]
    thing = thing if len(thing) else pixels.reshape(-1, 3)
    lag_s, levels = float("nan"), None
    if sound is not None:
        lag_s = sound_onset_s(sound, rate_hz) - motion_onset_s(video, fps)
        levels = sound_features(torch.from_numpy(sound), rate_hz)
    return Seen(histogram(thing), thing.mean(0), measure_direction(video), lag_s, 1 / fps, levels)


def histogram(pixels: Features) -> Features:
    """[SHADES^3] share of pixels [n, 3] in 0 to 1 by colour.

    A pixel counts for the eight colours around it, the more the nearer: a slightly other colour
    has a slightly other histogram.
    """
    scaled = pixels * (SHADES - 1)
    below = np.minimum(scaled.astype(int), SHADES - 2)
    beyond = scaled - below
    counts = np.zeros(SHADES**3)
    for corner in itertools.product((0, 1), repeat=3):
        share = np.where(corner, beyond, 1 - beyond).prod(axis=1)
        index = (below + corner) @ (SHADES**2, SHADES, 1)
        counts += np.bincount(index, share, minlength=SHADES**3)
    return counts / len(pixels)


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

    The object is the one whose real clips have the nearest colours, the sound the one whose real
    clips have the nearest levels (`kinds`); "everything_named" is the share of
    the clips in which all of object, direction and sound are found that any caption names. The
    colour is off by the root of the mean square distance of the thing's mean colour to that of the
    real clips of its name, and by "colour_other" to those of the others.

    Args:
        told: of each generated clip.
        made: what these show.
        real: clips of the data. One of them is compared with the others alone.
    """
    pairs = list(zip(told, made, strict=True))
    figures: dict[str, float] = {}
    of_made, of_real, chance = _named(pairs, real)
    if len(of_made) > 1:
        of_made["everything_named"] = _all(of_made)
        of_real["everything_named"] = _all(of_real)
        chance["everything_named"] = _same(told)
    for name, answers in of_made.items():
        if any(answer is not None for answer in answers):
            figures |= {name: _share(answers), f"{name}_real": _share(of_real[name])}
            figures[f"{name}_chance"] = chance[name]
    figures |= _colours(pairs, real)
    for name, seen in (("", list(made)), ("_real", [s for _, s in real])):
        lags = np.array([s.lag_s / s.frame_s for s in seen if np.isfinite(s.lag_s)])
        if len(lags):
            figures[f"onset_lag_frames{name}"] = float(np.median(np.abs(lags)))
            figures[f"onset_within_a_frame{name}"] = _share(np.abs(lags) <= 1)
    return figures


def _named(
    pairs: Sequence[tuple[Told, Seen]], real: Sequence[tuple[Told, Seen]]
) -> tuple[dict[str, Answers], dict[str, Answers], dict[str, float]]:
    """By what may be named: whether it is found in clips and in real ones, and by chance."""
    of_made: dict[str, Answers] = {}
    of_real: dict[str, Answers] = {}
    chance: dict[str, float] = {}
    objects = Kinds([(t.sprite, s.colours) for t, s in real])
    if objects.num_names > 1:
        of_made["object"] = objects.found([(t.sprite, s.colours) for t, s in pairs])
        of_real["object"] = objects.found_in_real()
        chance["object"] = 1 / objects.num_names
    if any(t.direction for t, _ in pairs):
        of_made["direction"], of_real["direction"] = (
            [s.direction == t.direction if t.direction else None for t, s in side]
            for side in (pairs, real)
        )
        chance["direction"] = 1 / 4
    sounds = Kinds([(t.sound, s.levels) for t, s in real])
    if sounds.num_names > 1:
        of_made["sound"] = sounds.found([(t.sound, s.levels) for t, s in pairs])
        of_real["sound"] = sounds.found_in_real()
        chance["sound"] = 1 / sounds.num_names
    return of_made, of_real, chance


def _colours(
    pairs: Sequence[tuple[Told, Seen]], real: Sequence[tuple[Told, Seen]]
) -> dict[str, float]:
    """How far off the thing's mean colour is."""
    by_name: dict[str, list[Features]] = {}
    for what, seen in real:
        if what.sprite:
            by_name.setdefault(what.sprite, []).append(seen.colour)
    mean = {name: np.mean(colours, axis=0) for name, colours in by_name.items()}
    known = [(t.sprite, s.colour) for t, s in pairs if t.sprite in mean]
    if len(mean) < 2 or not known:
        return {}
    own = [np.square(colour - mean[name]).mean() for name, colour in known]
    others = [
        np.mean([np.square(colour - mean[other]).mean() for other in mean if other != name])
        for name, colour in known
    ]
    return {
        "colour_error": float(np.sqrt(np.mean(own))),
        "colour_error_other": float(np.sqrt(np.mean(others))),
    }


def _all(answers: Mapping[str, Answers]) -> Answers:
    """Whether all of a clip's hold; None where one is not known."""
    rows = zip(*answers.values(), strict=True)
    return [None if None in row else all(row) for row in rows]


def _same(told: Sequence[Told]) -> float:
    """Share of pairs of different captions that name the same: whoever mixes captions up is right.

    It is more than the product of the single chances where a sound goes with an object.
    """
    counts = Counter((one.sprite, one.direction, one.sound) for one in told)
    total = len(told) * (len(told) - 1)
    return sum(n * (n - 1) for n in counts.values()) / total if total else float("nan")


def _share(answers: Answers | NDArray[np.bool_]) -> float:
    known = [answer for answer in answers if answer is not None]
    return float(np.mean(known)) if known else float("nan")
