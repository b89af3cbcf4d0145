"""The stamp theatre: one stamp moves, turns, grows or shrinks over a background, with a sound.

A scene is a pure function of (seed, index); its caption says exactly what is in it, and its ground
truth goes with the record. The stamp stands still until the sound begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kinodit.data.demo.scenery import Scenery, backdrop, photo_scenery, plain_scenery
from kinodit.data.demo.sounds import PITCHES, SOUNDS, place
from kinodit.data.demo.stamps import Stamp, chosen_stamps, load_stamps, with_article
from kinodit.models.errors import UserError
from kinodit.models.random import generator

FPS = 16
DURATION_S = 2.0
NUM_FRAMES = round(FPS * DURATION_S)
_END_S = 1.9
"""When the motion is over: the last frames show where it led."""

ACTIONS: dict[str, tuple[str, ...]] = {
    "move": ("left", "right", "up", "down"),
    "turn": ("clockwise", "anticlockwise"),
    "grow": ("",),
    "shrink": ("",),
}
_VERBS = {"move": "moves", "turn": "turns", "grow": "grows", "shrink": "shrinks"}
# A move to the left sounds like one to the right.
_SOUNDS = {
    ("move", "left"): "whoosh",
    ("move", "right"): "whoosh",
    ("move", "up"): "rising tone",
    ("move", "down"): "falling tone",
    ("turn", "clockwise"): "warble",
    ("turn", "anticlockwise"): "warble",
    ("grow", ""): "rising tone",
    ("shrink", ""): "falling tone",
}
_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


class TheatreError(UserError):
    """Theatre options that make no scene."""


@dataclass(frozen=True)
class TheatreOptions:
    """What may be on stage. `size` is the side of the square frame in pixels.

    sprites: names of the stamps that act, such as ("frog", "fire engine"); (): all, or the first
             `num_sprites`
    sounds:  "action": what a stamp does is heard, and its caption does not say so; "object": each
             stamp has a sound of its own, which its caption names
    """

    size: int = 64
    seed: int = 0
    actions: tuple[str, ...] = tuple(ACTIONS)
    backgrounds: Literal["photo", "plain"] = "photo"
    num_sprites: int | None = None
    sprites: tuple[str, ...] = ()
    sounds: Literal["action", "object"] = "action"
    stamps: Path | None = None

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 256 or self.size % 2:
            raise TheatreError(f"size is {self.size}; it must be even and from 32 to 256 pixels")
        unknown = [action for action in self.actions if action not in ACTIONS]
        if unknown or not self.actions:
            raise TheatreError(
                f"actions are {', '.join(self.actions) or '(none)'}; choose of {', '.join(ACTIONS)}"
            )
        if self.num_sprites is not None and self.num_sprites < 1:
            raise TheatreError(f"num-sprites is {self.num_sprites}; it must be at least 1")
        if self.num_sprites is not None and self.sprites:
            raise TheatreError("num-sprites and sprites both say which pictures act; leave one out")


@dataclass(frozen=True)
class Scene:
    """What happens in one clip. Lengths are shares of the frame's side, angles degrees."""

    action: str
    direction: str
    stamp: int
    mirrored: bool
    background: int
    scale: float
    start: tuple[float, float]
    travel: float
    onset_s: float
    pitch: str
    sound: str

    def pose(self, time_s: float) -> tuple[float, float, float, float]:
        """(centre x, centre y, angle anticlockwise, scale) at a time."""
        progress = min(1.0, max(0.0, (time_s - self.onset_s) / (_END_S - self.onset_s)))
        x, y = self.start
        angle, scale = 0.0, self.scale
        if self.action == "move":
            dx, dy = _WAYS[self.direction]
            x, y = x + dx * self.travel * progress, y + dy * self.travel * progress
        elif self.action == "turn":
            angle = progress * (-180.0 if self.direction == "clockwise" else 180.0)
        elif self.action == "grow":
            scale = self.scale * (0.4 + 0.6 * progress)
        else:
            scale = self.scale * (1 - 0.6 * progress)
        return x, y, angle, scale


def sound_of(stamp: int) -> tuple[str, str]:
    """(pitch, sound) that goes with a stamp; those of neighbours differ in both.

    The numbers of kinds and of pitches have no common divisor, so that all pairs come up before
    one comes again.
    """
    kinds, pitches = list(SOUNDS), list(PITCHES)
    return pitches[stamp % len(pitches)], kinds[stamp % len(kinds)]


class Theatre:
    """All stamps and backgrounds in memory, and the scenes that can be made of them."""

    def __init__(self, options: TheatreOptions) -> None:
        self.options = options
        stamps = load_stamps(options.stamps, options.num_sprites)
        self.stamps: list[Stamp] = chosen_stamps(stamps, options.sprites)
        self.scenery: list[Scenery] = (
            photo_scenery() if options.backgrounds == "photo" else plain_scenery()
        )
        self._parts = [
            (action, direction) for action in options.actions for direction in ACTIONS[action]
        ]

    def scene(self, index: int) -> Scene:
        """Scene `index`. Actions and directions take turns, so that each is equally frequent."""
        draw = generator(self.options.seed, "theatre", index)
        action, direction = self._parts[index % len(self._parts)]
        scale = float(draw.uniform(0.38, 0.5))
        travel = float(draw.uniform(0.5, 0.6)) if action == "move" else 0.0
        # Along its way a stamp's path is centred; across it, it stays inside the frame.
        room = (1 - scale) / 2 * (1.0 if action == "move" else 0.6)
        x, y = (
            0.5 - way * travel / 2 if way else 0.5 + room * float(draw.uniform(-1, 1))
            for way in _WAYS.get(direction, (0, 0))
        )
        scene = Scene(
            action=action,
            direction=direction,
            stamp=int(draw.integers(len(self.stamps))),
            mirrored=bool(draw.random() < 0.5),
            background=int(draw.integers(len(self.scenery))),
            scale=scale,
            start=(x, y),
            travel=travel,
            onset_s=float(draw.uniform(0.0, 0.4)),
            pitch=str(draw.choice(list(PITCHES))),
            sound=_SOUNDS[action, direction],
        )
        if self.options.sounds == "action":
            return scene
        pitch, sound = sound_of(scene.stamp)
        return replace(scene, pitch=pitch, sound=sound)

    def caption(self, scene: Scene) -> str:
        """What is seen: "a kangaroo moves left over a beach"; and heard: "... with a high bell"."""
        doing = f"{_VERBS[scene.action]} {scene.direction}".strip()
        background = self.scenery[scene.background].phrase
        seen = f"{self.stamps[scene.stamp].phrase} {doing} over {background}"
        if self.options.sounds == "action":
            return seen
        return f"{seen} with {with_article(f'{scene.pitch} {scene.sound}')}"

    def frames(self, scene: Scene, index: int) -> NDArray[np.uint8]:
        """The clip, [NUM_FRAMES, size, size, 3]."""
        size = self.options.size
        stage = self._stage(scene, index)
        actor = self._actor(scene)
        frames = np.empty((NUM_FRAMES, size, size, 3), np.uint8)
        for number in range(NUM_FRAMES):
            layer = self._placed(actor, scene, number / FPS)
            frames[number] = np.asarray(Image.alpha_composite(stage, layer).convert("RGB"))
        return frames

    def picture(self, scene: Scene, index: int) -> Image.Image:
        """The last frame of the clip, RGB."""
        return self._on(self._stage(scene, index), scene)

    def portrait(self, scene: Scene) -> Image.Image:
        """Its actor as in the last frame, before plain grey: RGB."""
        size = self.options.size
        return self._on(Image.new("RGBA", (size, size), (128, 128, 128, 255)), scene)

    def _stage(self, scene: Scene, index: int) -> Image.Image:
        draw = generator(self.options.seed, "backdrop", index)
        return backdrop(self.scenery[scene.background], self.options.size, draw).convert("RGBA")

    def _on(self, stage: Image.Image, scene: Scene) -> Image.Image:
        layer = self._placed(self._actor(scene), scene, (NUM_FRAMES - 1) / FPS)
        return Image.alpha_composite(stage, layer).convert("RGB")

    def sound(self, scene: Scene, index: int) -> NDArray[np.float32]:
        """The scene's sound, [samples] for the whole clip."""
        draw = generator(self.options.seed, "sound", index)
        length_s = _END_S - scene.onset_s
        sound = SOUNDS[scene.sound](length_s, PITCHES[scene.pitch], draw)
        return place(sound, scene.onset_s, DURATION_S)

    def _actor(self, scene: Scene) -> Image.Image:
        picture = self.stamps[scene.stamp].picture
        if scene.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        factor = scene.scale * self.options.size / max(picture.size)
        width, height = (max(1, round(side * factor)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)

    def _placed(self, actor: Image.Image, scene: Scene, time_s: float) -> Image.Image:
        """A transparent layer with the actor at its pose, to a fraction of a pixel."""
        size = self.options.size
        x, y, angle, scale = scene.pose(time_s)
        shrink = scene.scale / scale
        cos, sin = shrink * np.cos(np.radians(angle)), shrink * np.sin(np.radians(angle))
        # PIL asks where in the actor a pixel of the layer comes from; y points down.
        centre_x, centre_y = actor.width / 2, actor.height / 2
        matrix = (
            cos, -sin, centre_x - cos * x * size + sin * y * size,
            sin, cos, centre_y - sin * x * size - cos * y * size,
        )  # fmt: skip
        return actor.transform(
            (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
