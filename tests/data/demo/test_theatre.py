"""The theatre's ground truth is in its pixels and its sound, not only in its captions."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kinodit.data.demo.measure import measure_direction, motion
from kinodit.data.demo.mux import SAMPLE_RATE, decode_frames, encode_mp4
from kinodit.data.demo.sounds import PITCHES, SOUNDS, onset_s, place
from kinodit.data.demo.stamps import (
    EMOJI,
    PICTURE_SIDE,
    StampError,
    folder_stamps,
    load_stamps,
    with_article,
)
from kinodit.data.demo.theatre import (
    ACTIONS,
    DURATION_S,
    FPS,
    Theatre,
    TheatreError,
    TheatreOptions,
    sound_of,
)
from kinodit.models.random import generator
from tests.support.quick import quick


@pytest.fixture(scope="module")
def theatre() -> Theatre:
    return Theatre(TheatreOptions())


def small(frames: NDArray[np.uint8], count: int = 8, side: int = 32) -> NDArray[np.uint8]:
    """What a small model sees: `count` frames of `side` pixels."""
    chosen = frames[:: len(frames) // count][:count]
    return np.stack(
        [np.asarray(Image.fromarray(f).resize((side, side), Image.Resampling.BOX)) for f in chosen]
    )


def test_every_emoji_has_a_picture_and_a_natural_name() -> None:
    stamps = load_stamps()
    names = [stamp.phrase for stamp in stamps]
    assert len(set(names)) == len(names) == len(EMOJI) + 5
    assert all(max(stamp.picture.size) == PICTURE_SIDE for stamp in stamps)
    for stamp in stamps:
        covered = np.asarray(stamp.picture.getchannel("A"), dtype=np.float32).mean() / 255
        assert covered > 0.15, stamp.phrase
    assert stamps[EMOJI.index("FOX FACE")].phrase == "a fox"
    assert stamps[EMOJI.index("OCTOPUS")].phrase == "an octopus"
    assert f"U+{ord(unicodedata.lookup('FOX FACE')):X}" in stamps[2].source
    assert {len(np.unique(np.asarray(s.picture.convert("RGB")))) > 10 for s in stamps} == {True}


def test_articles() -> None:
    assert [with_article(noun) for noun in ("owl", "cat", "unicorn face", "umbrella")] == [
        "an owl", "a cat", "a unicorn face", "an umbrella",
    ]  # fmt: skip


def test_captions_name_what_the_scene_does(theatre: Theatre) -> None:
    scenes = [theatre.scene(index) for index in range(800)]
    parts = Counter((scene.action, scene.direction) for scene in scenes)
    assert set(parts.values()) == {100}
    assert len(parts) == sum(len(directions) for directions in ACTIONS.values())
    for scene in scenes[:50]:
        caption = theatre.caption(scene)
        assert caption.startswith(theatre.stamps[scene.stamp].phrase)
        assert caption.endswith(f" over {theatre.scenery[scene.background].phrase}")
        assert scene.direction in caption
    assert len({theatre.caption(scene) for scene in scenes}) > 600
    used = Counter(scene.stamp for scene in scenes)
    assert len(used) > 0.95 * len(theatre.stamps)


def test_scenes_depend_on_seed_and_number_only(theatre: Theatre) -> None:
    again = Theatre(TheatreOptions())
    other = Theatre(TheatreOptions(seed=1))
    for index in (0, 7, 123):
        scene = theatre.scene(index)
        assert scene == again.scene(index)
        assert scene != other.scene(index)
        np.testing.assert_array_equal(theatre.frames(scene, index), again.frames(scene, index))
        np.testing.assert_array_equal(theatre.sound(scene, index), again.sound(scene, index))


@pytest.mark.parametrize(
    ("backgrounds", "count"), quick([("photo", 100), ("plain", 40)], ("plain", 40))
)
def test_direction_is_measured_right_on_encoded_clips(backgrounds: str, count: int) -> None:
    """At least 99 % at 32 pixels and 8 frames, also under the noise of a sampler."""
    theatre = Theatre(TheatreOptions(actions=("move",), backgrounds=backgrounds, seed=5))  # type: ignore[arg-type]
    noise = np.random.default_rng(0)
    right = noisy_right = 0
    for index in range(count):
        scene = theatre.scene(index)
        frames, _, _ = decode_frames(encode_mp4(theatre.frames(scene, index), FPS, None))
        video = small(frames)
        right += measure_direction(video) == scene.direction
        noisy = np.clip(video + noise.normal(0, 12, video.shape), 0, 255).astype(np.uint8)
        noisy_right += measure_direction(noisy) == scene.direction
    assert right >= 0.99 * count
    assert noisy_right >= 0.97 * count


def test_motion_travels_at_least_half_the_frame(theatre: Theatre) -> None:
    moves = [scene for scene in map(theatre.scene, range(200)) if scene.action == "move"]
    for scene in moves:
        start, end = scene.pose(0.0), scene.pose(2.0)
        way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[scene.direction]
        x, y = end[0] - start[0], end[1] - start[1]
        assert x * way[0] + y * way[1] >= 0.5
        assert x * way[1] == y * way[0] == 0
        assert 0.35 <= scene.scale <= 0.5
        assert scene.pose(scene.onset_s) == start


def test_the_pictures_that_are_named_act() -> None:
    names = ("fire engine", "frog", "round photo of a cat")
    theatre = Theatre(TheatreOptions(actions=("move",), sprites=names))
    assert [stamp.phrase for stamp in theatre.stamps] == [f"a {name}" for name in names]
    with pytest.raises(StampError, match="'frogs', which no picture is of; near it are frog"):
        Theatre(TheatreOptions(sprites=("frogs",)))
    with pytest.raises(StampError, match="named once"):
        Theatre(TheatreOptions(sprites=("frog", "frog")))


def test_sounds_may_go_with_objects_and_are_named_then() -> None:
    options = TheatreOptions(actions=("move",), backgrounds="plain", num_sprites=8)
    theatre, other = Theatre(replace(options, sounds="object")), Theatre(options)
    for index in range(40):
        scene, before = theatre.scene(index), other.scene(index)
        pitch, sound = sound_of(scene.stamp)
        assert scene == replace(before, pitch=pitch, sound=sound)
        assert theatre.caption(scene) == f"{other.caption(before)} with a {pitch} {sound}"
        draw = generator(0, "sound", index)
        wave = SOUNDS[sound](1.9 - scene.onset_s, PITCHES[pitch], draw)
        np.testing.assert_array_equal(
            theatre.sound(scene, index), place(wave, scene.onset_s, DURATION_S)
        )
    assert len({sound_of(stamp) for stamp in range(21)}) == 21


def test_turning_growing_and_shrinking_are_in_the_pixels() -> None:
    options = TheatreOptions(actions=("grow", "shrink"), backgrounds="plain", num_sprites=8)
    theatre = Theatre(options)
    for index in range(8):
        scene = theatre.scene(index)
        frames = theatre.frames(scene, index).astype(int)
        ground = np.median(frames[:, 0, 0], axis=0)
        area = [(np.abs(frame - ground).sum(-1) > 60).sum() for frame in (frames[0], frames[-1])]
        assert (area[1] > 3 * area[0]) == (scene.action == "grow")
        assert (area[0] > 3 * area[1]) == (scene.action == "shrink")
    theatre = Theatre(TheatreOptions(actions=("turn",), backgrounds="plain", num_sprites=8))
    for index in range(8):
        scene = theatre.scene(index)
        angles = [scene.pose(time)[2] for time in (0.0, 1.0, 2.0)]
        sign = -1 if scene.direction == "clockwise" else 1
        assert 0 < sign * angles[1] < sign * angles[2] == 180
        # Half a turn shows the picture upside down, where it was.
        frames = theatre.frames(scene, index).astype(int)
        x, y, _, _ = scene.pose(0)
        ground = np.median(frames[:, 0, 0], axis=0)
        for frame in (frames[0], frames[-1]):
            weight = np.abs(frame - ground).sum(-1)
            rows, columns = np.nonzero(weight > 60)
            centre = (
                (columns.min() + columns.max() + 1) / 128,
                (rows.min() + rows.max() + 1) / 128,
            )
            assert centre == pytest.approx((x, y), abs=0.03)


def test_clockwise_is_clockwise() -> None:
    """A stamp whose mass is on its right has it below after a quarter turn clockwise."""
    theatre = Theatre(TheatreOptions(actions=("turn",), backgrounds="plain", num_sprites=1))
    picture = Image.new("RGBA", (160, 160))
    picture.paste((255, 0, 0, 255), (100, 60, 160, 100))
    theatre.stamps[0] = type(theatre.stamps[0])("a flag", picture, "", "")
    for index in range(4):
        scene = theatre.scene(index)
        quarter = scene.onset_s + (1.9 - scene.onset_s) / 2
        layer = np.asarray(theatre._placed(theatre._actor(scene), scene, quarter).getchannel("A"))
        rows, columns = np.nonzero(layer > 128)
        x, y = (columns.mean() + 0.5) / 64, (rows.mean() + 0.5) / 64
        side = -1 if scene.mirrored else 1
        below = side if scene.direction == "clockwise" else -side
        assert (y - scene.start[1]) * below > 0.08
        assert abs(x - scene.start[0]) < 0.03


def test_the_sound_begins_when_the_stamp_does(theatre: Theatre) -> None:
    for index in range(12):
        scene = theatre.scene(index)
        clip = encode_mp4(theatre.frames(scene, index), FPS, theatre.sound(scene, index))
        frames, fps, sound = decode_frames(clip)
        assert frames.shape == (32, 64, 64, 3)
        assert fps == Fraction(16)
        assert sound is not None
        assert onset_s(sound) == pytest.approx(scene.onset_s, abs=0.02)
        raw = theatre.frames(scene, index)
        changed = np.flatnonzero(np.abs(np.diff(raw.astype(int), axis=0)).max(axis=(1, 2, 3)) > 8)
        assert 0 <= (changed[0] + 1) / FPS - scene.onset_s <= 2.5 / FPS


@pytest.mark.parametrize("name", list(SOUNDS))
def test_sounds_have_the_onset_they_are_given(name: str) -> None:
    sound = SOUNDS[name](0.7, 440.0, np.random.default_rng(0))
    assert len(sound) == round(0.7 * SAMPLE_RATE)
    assert 0.3 < np.abs(sound).max() <= 0.5
    placed = place(sound, 0.25, 1.0)
    assert onset_s(placed, 0.02) == pytest.approx(0.25, abs=0.01)
    assert not placed[: round(0.25 * SAMPLE_RATE)].any()
    assert np.abs(placed[-round(0.04 * SAMPLE_RATE) :]).max() == 0


def test_tones_rise_and_fall() -> None:
    def pitch(piece: NDArray[np.float32]) -> float:
        return float(np.argmax(np.abs(np.fft.rfft(piece)))) * SAMPLE_RATE / len(piece)

    draw = np.random.default_rng(0)
    for name, ratio in (("rising tone", 2.0), ("falling tone", 0.5), ("steady tone", 1.0)):
        sound = SOUNDS[name](1.0, 440.0, draw)
        assert pitch(sound[-1600:-800]) / pitch(sound[:800]) == pytest.approx(ratio, rel=0.15)


def test_measuring_needs_no_stamp_and_no_colour() -> None:
    rows, columns = np.mgrid[:32, :32]
    for way, (dx, dy) in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items():
        frames = []
        for time in np.linspace(-1, 1, 8):
            x, y = 16 + 9 * dx * time, 16 + 9 * dy * time
            disc = (rows - y) ** 2 + (columns - x) ** 2 < 36
            frames.append(np.where(disc, 140, 110).astype(np.uint8))
        video = np.repeat(np.stack(frames)[..., None], 3, axis=-1)
        assert measure_direction(video) == way
        assert measure_direction(255 - video) == way
        moved = motion(video)
        assert dx * moved[0] + dy * moved[1] > 0.2
    assert motion(np.full((8, 32, 32, 3), 7, np.uint8)) == (0.0, 0.0)


def test_a_folder_of_stamps_joins_the_troupe(tmp_path: Path) -> None:
    def stamp(name: str, text: str | None, alpha: int = 0) -> None:
        picture = Image.new("RGBA", (40, 30), (0, 0, 0, alpha))
        picture.paste((200, 30, 30, 255), (5, 5, 30, 25))
        picture.save(tmp_path / f"{name}.png")
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")

    stamp("kangaroo", "A red kangaroo.\nde.utf8=Ein rotes Känguru.\n")
    stamp("owl", "An owl!")
    stamp("sentence", "The moon is far away.")
    stamp("opaque", "A box.", alpha=255)
    stamp("silent", None)
    (tmp_path / "broken.png").write_bytes(b"x")
    (tmp_path / "broken.txt").write_text("A broken one.")
    assert [stamp.phrase for stamp in folder_stamps(tmp_path)] == ["a red kangaroo", "an owl"]
    options = TheatreOptions(stamps=tmp_path, num_sprites=1, actions=("move",))
    theatre = Theatre(options)
    assert theatre.caption(theatre.scene(0)).startswith("a red kangaroo moves left over ")
    assert len(load_stamps(tmp_path)) == 2 + len(load_stamps())
    (tmp_path / "none").mkdir()
    with pytest.raises(StampError, match="has no stamps: of 0 PNG files"):
        folder_stamps(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 33}, "size is 33"),
        ({"size": 16}, "from 32 to 256"),
        ({"actions": ("move", "jump")}, "choose of move, turn, grow, shrink"),
        ({"actions": ()}, "actions are"),
        ({"num_sprites": 0}, "num-sprites is 0"),
        ({"num_sprites": 2, "sprites": ("frog",)}, "leave one out"),
    ],
)
def test_options_that_make_no_scene(options: dict[str, object], message: str) -> None:
    with pytest.raises(TheatreError, match=message):
        TheatreOptions(**options)  # type: ignore[arg-type]
