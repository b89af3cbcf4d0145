"""A ball that bounces, and clicks whenever it does: picture and sound that follow from each other.

The ball flies in one gravity, so that the height of its flight follows from the time between two
bounces, and loses nothing. A scene is a pure function of (seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kinodit.data.demo.mux import SAMPLE_RATE
from kinodit.data.demo.sounds import PITCHES, Sound
from kinodit.data.demo.theatre import DURATION_S, FPS, NUM_FRAMES
from kinodit.models.random import generator

PERIODS_S = (0.5, 0.85)
"""Least and most time from one bounce to the next, seconds."""
FLOOR, RADIUS = 0.88, 0.11
"""Where the floor is, from the top, and the ball's radius, in shares of the frame's side."""
HIGHEST = 0.6
"""Of the ball's flight, over the floor, at the longest period; in shares of the side."""
COLOURS = {
    "red": (224, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 235),
    "yellow": (235, 205, 30),
}
_WALL, _GROUND = (72, 72, 72), (120, 120, 120)
"""Grey, so that what has a colour is the ball."""
_FINER = 8
"""The ball is drawn at this many times the size: its place shows to a fraction of a pixel."""
_CLICK_S, _DECAY_S, _PEAK = 0.06, 0.012, 0.5


@dataclass(frozen=True)
class Bounce:
    """What happens in one clip. Lengths are shares of the frame's side.

    period_s: from one bounce to the next
    first_s:  the first bounce, less than a period after the clip begins
    """

    colour: str
    pitch: str
    period_s: float
    first_s: float

    @property
    def bounces_s(self) -> list[float]:
        """When the ball touches the floor, seconds."""
        count = int(np.ceil((DURATION_S - self.first_s) / self.period_s))
        return [self.first_s + turn * self.period_s for turn in range(count)]

    @property
    def caption(self) -> str:
        """What is seen and heard: "a red ball bounces with high clicks"."""
        return f"a {self.colour} ball bounces with {self.pitch} clicks"

    def row(self, time_s: float) -> float:
        """Of the ball's centre at a time, from the top. Its column is the middle one."""
        part = ((time_s - self.first_s) / self.period_s) % 1
        # h = g T^2 / 8 is the height of a flight of time T.
        height = HIGHEST * (self.period_s / PERIODS_S[1]) ** 2
        return FLOOR - RADIUS - height * 4 * part * (1 - part)


def bounce(seed: int, index: int) -> Bounce:
    """Scene `index`."""
    draw = generator(seed, "bounce", index)
    period_s = float(draw.uniform(*PERIODS_S))
    return Bounce(
        colour=str(draw.choice(list(COLOURS))),
        pitch=str(draw.choice(list(PITCHES))),
        period_s=period_s,
        first_s=period_s * float(draw.random()),
    )


def frames(scene: Bounce, size: int) -> NDArray[np.uint8]:
    """The clip, [NUM_FRAMES, size, size, 3]."""
    clip = np.empty((NUM_FRAMES, size, size, 3), np.uint8)
    side = size * _FINER
    stage = Image.new("RGB", (side, side), _WALL)
    ImageDraw.Draw(stage).rectangle((0, FLOOR * side, side, side), fill=_GROUND)
    for number in range(NUM_FRAMES):
        picture, row = stage.copy(), scene.row(number / FPS)
        edges = (0.5 - RADIUS, row - RADIUS, 0.5 + RADIUS, row + RADIUS)
        box = [side * edge for edge in edges]
        ImageDraw.Draw(picture).ellipse(box, fill=COLOURS[scene.colour])
        clip[number] = np.asarray(picture.resize((size, size), Image.Resampling.BOX))
    return clip


def sound(scene: Bounce) -> Sound:
    """The clicks, [samples] for the whole clip."""
    out = np.zeros(round(DURATION_S * SAMPLE_RATE), np.float32)
    t = np.arange(round(_CLICK_S * SAMPLE_RATE)) / SAMPLE_RATE
    click = _PEAK * np.cos(2 * np.pi * 2 * PITCHES[scene.pitch] * t) * np.exp(-t / _DECAY_S)
    for at_s in scene.bounces_s:
        start = round(at_s * SAMPLE_RATE)
        piece = out[start : start + len(click)]
        piece += click[: len(piece)].astype(np.float32)
    return out
