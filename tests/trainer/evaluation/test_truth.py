"""What clips show is read back from pixels and sound of known content; embedded features notice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kinodit.models.random import generator
from kinodit.trainer.evaluation.embedded import (
    picture_features,
    sound_features,
    video_features,
)
from kinodit.trainer.evaluation.kinds import Kinds
from kinodit.trainer.evaluation.truth import (
    Seen,
    Told,
    compare,
    histogram,
    motion_onset_s,
    see,
    sound_onset_s,
)

COLOURS = {"a red ball": (220, 40, 40), "a green ball": (40, 200, 60), "a blue ball": (50, 60, 220)}
RATE = 8000


def clip(name: str, direction: str, begins: int = 0) -> NDArray[np.uint8]:
    """A square of a colour that moves over grey from frame `begins` on, 16 frames of 32 px."""
    video = np.full((16, 32, 32, 3), 120, np.uint8)
    for frame in range(16):
        way = max(0, frame - begins) * 20 // 15
        x, y = {
            "right": (way, 12), "left": (22 - way, 12), "down": (12, way), "up": (12, 22 - way),
        }[direction]  # fmt: skip
        video[frame, y : y + 8, x : x + 8] = COLOURS[name]
    return video


def click(at_s: float) -> NDArray[np.float32]:
    sound = np.zeros((1, 2 * RATE), np.float32)
    sound[0, round(at_s * RATE) :][:400] = 0.4
    return sound


def shown(name: str, direction: str, lag_frames: float = 0.0) -> Seen:
    # It has moved by a pixel in frame 5: 4 frames of standing still, and one step.
    sound = click(5 / 8 + lag_frames / 8)
    return see(clip(name, direction, begins=4), 8.0, sound, RATE)


def test_onsets() -> None:
    assert motion_onset_s(clip("a red ball", "right", begins=6), 8.0) == 7 / 8
    assert math.isnan(motion_onset_s(np.zeros((4, 8, 8, 3), np.uint8), 8.0))
    assert sound_onset_s(click(0.75), RATE) == pytest.approx(0.75)
    assert math.isnan(sound_onset_s(np.zeros((1, 100), np.float32), RATE))


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_what_is_shown_is_seen(direction: str) -> None:
    seen = shown("a green ball", direction, lag_frames=2)
    assert seen.direction == direction
    assert np.abs(seen.colour * 255 - COLOURS["a green ball"]).max() < 25
    assert seen.lag_s / seen.frame_s == pytest.approx(2, abs=0.01)
    silent = see(clip("a red ball", direction), 8.0, None, 0)
    assert math.isnan(silent.lag_s)


REAL = [
    (Told(name, direction), shown(name, direction))
    for name in COLOURS
    for direction in ("left", "up")
]


def test_clips_that_do_as_told() -> None:
    told = [what for what, _ in REAL]
    figures = compare(told, [seen for _, seen in REAL], REAL)
    assert figures["object"] == figures["direction"] == figures["onset_within_a_frame"] == 1
    assert figures["object_real"] == figures["direction_real"] == 1
    assert figures["object_chance"] == pytest.approx(1 / 3)
    assert figures["colour_error"] < 0.02 < 0.3 < figures["colour_error_other"]
    assert figures["onset_lag_frames"] == pytest.approx(0, abs=0.01)


def test_clips_that_do_not() -> None:
    others = [shown("a red ball", "right", lag_frames=-3) for _ in REAL]
    figures = compare([what for what, _ in REAL], others, REAL)
    assert figures["object"] == pytest.approx(1 / 3) and figures["direction"] == 0
    assert figures["onset_within_a_frame"] == 0
    assert figures["onset_lag_frames"] == pytest.approx(3, abs=0.01)
    assert figures["colour_error"] > 0.2


TONES_HZ = {"a red ball": 300, "a green ball": 800, "a blue ball": 2000}
"""What each is heard by, where a sound goes with it."""


def heard(name: str, direction: str, onset_s: float, tone_of: str = "") -> tuple[Told, Seen]:
    """A ball and its tone, or that of another."""
    time = np.arange(2 * RATE) / RATE
    tone = 0.3 * np.sin(2 * np.pi * TONES_HZ[tone_of or name] * time) * (time > onset_s)
    sound = tone[None].astype(np.float32)
    told = Told(name, direction, "move", f"{TONES_HZ[name]} Hz")
    return told, see(clip(name, direction, begins=4), 8.0, sound, RATE)


SOUNDING = [
    heard(name, direction, onset_s)
    for name in COLOURS
    for direction, onset_s in (("left", 0.1), ("up", 0.4))
]


def test_sounds_are_told_apart_whenever_they_begin() -> None:
    told = [what for what, _ in SOUNDING]
    figures = compare(told, [seen for _, seen in SOUNDING], SOUNDING)
    assert figures["sound"] == figures["sound_real"] == 1
    assert figures["sound_chance"] == pytest.approx(1 / 3)
    assert figures["everything_named"] == figures["everything_named_real"] == 1
    # Of five other captions none names the same.
    assert figures["everything_named_chance"] == 0
    doubled = compare(told * 2, [seen for _, seen in SOUNDING] * 2, SOUNDING)
    assert doubled["everything_named_chance"] == pytest.approx(1 / 11)


def test_everything_named_asks_for_all_of_it_in_one_clip() -> None:
    """Two of six have another's tone, and one of the others goes another way."""
    clips = [
        heard("a red ball", "left", 0.2, tone_of="a blue ball"),
        heard("a red ball", "up", 0.2),
        heard("a green ball", "left", 0.2, tone_of="a red ball"),
        heard("a green ball", "up", 0.2),
        heard("a blue ball", "left", 0.2),
        heard("a blue ball", "up", 0.2),
    ]
    told = [what for what, _ in clips]
    told[5] = replace(told[5], direction="down")
    figures = compare(told, [seen for _, seen in clips], SOUNDING)
    assert figures["object"] == 1
    assert figures["sound"] == pytest.approx(4 / 6)
    assert figures["direction"] == pytest.approx(5 / 6)
    assert figures["everything_named"] == pytest.approx(3 / 6)


def test_a_sound_that_no_caption_names_is_not_asked_for() -> None:
    told = [replace(what, sound="") for what, _ in SOUNDING]
    figures = compare(told, [seen for _, seen in SOUNDING], SOUNDING)
    assert "sound" not in figures and "everything_named" not in figures
    known = [(replace(what, sound=""), seen) for what, seen in SOUNDING]
    figures = compare(told, [seen for _, seen in SOUNDING], known)
    assert "sound" not in figures and figures["everything_named"] == 1


def test_a_colour_between_two_counts_for_both() -> None:
    shares = histogram(np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.125]]))
    red, black, dark_blue = shares[4 * 25], shares[0], shares[1]
    assert (red, black, dark_blue) == pytest.approx((0.5, 0.25, 0.25))
    assert shares.sum() == pytest.approx(1)


def test_what_varies_within_a_kind_counts_little() -> None:
    """The first feature says nothing and varies much, the second tells a from b."""
    values = [(name, x, y) for name, y in (("a", 0.0), ("b", 3.0)) for x in (-9, -3, 3, 9)]
    noise = generator(0, "kinds").normal(0, 0.1, (len(values), 2))
    real = [(n, np.array([x, y]) + off) for (n, x, y), off in zip(values, noise, strict=True)]
    shift = {"a": np.array([4.0, 0.0]), "b": np.array([-4.0, 0.0])}
    shifted = [(name, features + shift[name]) for name, features in real]
    kinds = Kinds([*real, *shifted])
    assert kinds.found_in_real() == [True] * 16
    # By plain distance these are nearer to the other's mean, (-2, 3) or (2, 0).
    asked = [("a", np.array([-8.0, 0.6])), ("b", np.array([8.0, 2.4]))]
    assert kinds.found(asked) == [True, True]


def test_a_real_clip_is_not_compared_with_itself() -> None:
    """Of two of a kind at 0 and 3, the latter is nearer to others at 4 and 5.2 than to the first.

    To the mean of both, 1.5, it would be nearer.
    """
    values = (("a", 0.0), ("a", 3.0), ("b", 4.0), ("b", 5.2), ("c", 9.0), ("", 1.0))
    kinds = Kinds([(name, np.array([value])) for name, value in values])
    assert kinds.num_names == 3
    assert kinds.found_in_real() == [True, False, True, True, None, None]
    asked = [("a", 3.0), ("b", 3.0), ("c", 7.5), ("d", 3.0)]
    found = kinds.found([(name, np.array([value])) for name, value in asked])
    assert found == [True, False, True, None]


def test_nothing_is_said_of_what_was_not_told() -> None:
    nothing = [(Told(), replace(seen, lag_s=math.nan)) for _, seen in REAL]
    assert compare([Told()] * len(REAL), [seen for _, seen in nothing], nothing) == {}


def test_a_tone_that_is_on_and_off_is_told_from_a_steady_one_of_its_mean_level() -> None:
    time = torch.arange(2 * RATE) / RATE
    tone = torch.sin(2 * torch.pi * 250 * time)[None] * 0.3
    broken = tone * ((time * 5) % 1 < 0.5)
    of_tone, of_broken = (sound_features(s, RATE).reshape(2, 8, 12) for s in (tone, broken))
    band = int(of_tone[0, 4].argmax())
    # Of each: mean, then deviation, in the parts between the ends.
    assert of_tone[1, 1:-1, band].max() < 0.01
    assert of_broken[1, 1:-1, band].min() > 0.1
    assert of_broken[0, 1:-1, band].max() < of_tone[0, 4, band]


def test_embedded_features_notice_colour_motion_and_pitch() -> None:
    red, blue = (torch.from_numpy(clip(f"a {c} ball", "left")) for c in ("red", "blue"))
    assert not np.allclose(picture_features(red), picture_features(blue), atol=1e-3)
    other_way = torch.from_numpy(clip("a red ball", "right"))
    assert not np.allclose(video_features(red), video_features(other_way), atol=1e-3)
    assert np.array_equal(video_features(red), video_features(red))
    time = torch.arange(2 * RATE) / RATE
    low, high = (torch.sin(2 * torch.pi * hz * time)[None] * 0.3 for hz in (250, 1500))
    first, second = sound_features(low, RATE), sound_features(high, RATE)
    # Bands run fastest, then times.
    middle = [int(part[: 8 * 12].reshape(8, 12)[4].argmax()) for part in (first, second)]
    assert middle[0] < middle[1]
    assert picture_features(torch.zeros(1, 17, 19, 3, dtype=torch.uint8)).shape == (96,)
