"""The ball flies as gravity has it, and clicks when it touches the floor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kinodit.data.demo.bounce import COLOURS, FLOOR, PERIODS_S, RADIUS, bounce, frames, sound
from kinodit.data.demo.build import DemoOptions, build, jobs
from kinodit.data.demo.mux import SAMPLE_RATE
from kinodit.data.demo.sounds import onset_s
from kinodit.data.demo.theatre import DURATION_S, FPS, NUM_FRAMES, TheatreOptions
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardReader


@pytest.mark.parametrize("index", range(8))
def test_the_ball_touches_the_floor_at_its_bounces_and_is_above_it_between(index: int) -> None:
    scene = bounce(0, index)
    assert PERIODS_S[0] <= scene.period_s <= PERIODS_S[1]
    assert 0 <= scene.first_s < scene.period_s
    for time_s in scene.bounces_s:
        assert scene.row(time_s) == pytest.approx(FLOOR - RADIUS, abs=1e-6)
        assert 0 <= time_s < DURATION_S
    times = np.linspace(0, DURATION_S, 400)
    rows = np.array([scene.row(time_s) for time_s in times])
    assert rows.max() <= FLOOR - RADIUS + 1e-9 and rows.min() >= RADIUS
    # One gravity for all balls: in free flight the second difference is the same.
    step_s = 0.01
    middle = scene.first_s + scene.period_s / 2
    low, here, high = (scene.row(middle + d) for d in (-step_s, 0, step_s))
    gravity = (low - 2 * here + high) / step_s**2
    other = bounce(0, index + 100)
    middle = other.first_s + other.period_s / 2
    low, here, high = (other.row(middle + d) for d in (-step_s, 0, step_s))
    assert gravity == pytest.approx((low - 2 * here + high) / step_s**2)


def test_pixels_and_samples_follow_the_scene() -> None:
    scene = bounce(0, 3)
    clip = frames(scene, 32)
    assert clip.shape == (NUM_FRAMES, 32, 32, 3)
    number = round(1.0 * FPS)
    seen = clip[number, int(scene.row(number / FPS) * 32), 16]
    assert np.abs(seen.astype(int) - COLOURS[scene.colour]).max() < 3
    samples = sound(scene)
    assert len(samples) == round(DURATION_S * SAMPLE_RATE)
    assert onset_s(samples) == pytest.approx(scene.bounces_s[0], abs=2 / SAMPLE_RATE)
    between = round((scene.bounces_s[0] + 0.6 * scene.period_s) * SAMPLE_RATE)
    assert np.abs(samples[between : between + 100]).max() == 0


def test_records_say_when_it_bounces_and_other_samples_stay_as_they_were(tmp_path: Path) -> None:
    theatre = TheatreOptions(size=32, seed=3)
    without = DemoOptions(theatre, 2, 3, 4)
    assert jobs(replace(without, num_bounces=5))[: len(jobs(without))] == jobs(without)
    build(tmp_path, DemoOptions(theatre, 0, 0, 0, False, num_bounces=3), workers=1)
    reader = ShardReader(Dataset(tmp_path))
    assert len(reader.dataset) == 3
    for number in range(3):
        scene, meta = bounce(3, number), reader.read(number).meta
        assert meta.extra["action"] == "bounce" and meta.has_audio
        assert meta.captions[0].text == scene.caption
        assert meta.scores["period_s"] == round(scene.period_s, 4)
        assert meta.scores["first_s"] == round(scene.first_s, 4)
