"""Bounces and clicks are found where the demo set says that they are, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kinodit.data.demo.bounce import Bounce, bounce, frames, sound
from kinodit.data.demo.mux import SAMPLE_RATE
from kinodit.data.demo.theatre import DURATION_S, FPS
from kinodit.trainer.evaluation.synchrony import (
    Events,
    bounces_s,
    clicks_s,
    compare_events,
    events_of,
    lags_s,
)

FRAME_S = 1 / FPS


def events(scene: Bounce, size: int = 32) -> Events:
    return events_of(frames(scene, size), FPS, sound(scene)[None], SAMPLE_RATE)


def at(*times_s: float) -> np.ndarray:
    return np.array(times_s, np.float64)


def clip(bounces: np.ndarray, clicks: np.ndarray) -> Events:
    return Events(bounces, clicks, 2.0, FRAME_S)


@pytest.mark.parametrize("index", range(6))
def test_they_are_found_to_a_tenth_of_a_frame(index: int) -> None:
    scene = bounce(0, index)
    found = events(scene)
    true = at(*scene.bounces_s)
    inner = true[(true > FRAME_S) & (true < DURATION_S - 2 * FRAME_S)]
    for time_s in inner:
        assert np.abs(found.bounces_s - time_s).min() < 0.1 * FRAME_S
    assert len(found.bounces_s) <= len(true)
    assert len(found.clicks_s) == len(true)
    # A click is loudest right after it begins.
    assert (found.clicks_s - true >= 0).all() and (found.clicks_s - true < 0.1 * FRAME_S).all()


def test_nothing_is_found_where_nothing_happens() -> None:
    grey = np.full((8, 16, 16, 3), 90, np.uint8)
    assert len(bounces_s(grey, 8.0)) == 0
    assert len(clicks_s(np.zeros((1, 8000), np.float32), 8000)) == 0
    still = grey.copy()
    still[:, 10:14, 4:8] = (200, 20, 20)
    assert len(bounces_s(still, 8.0)) == 0


def test_a_lag_is_to_the_nearest_and_a_missing_partner_costs_the_clip() -> None:
    one = clip(at(0.5, 1.5), at(0.6, 1.45))
    assert sorted(lags_s(one, one)) == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert list(lags_s(clip(at(0.5), at()), clip(at(0.5), at()))) == [2.0]
    # Clicks all the time are near every bounce, but far from it themselves.
    many = clip(at(1.0), np.arange(0.2, 1.9, 0.2))
    assert np.median(lags_s(many, many)) > 0.3
    # What happens at the very ends is not asked for, and may be a partner.
    ends = clip(at(0.01, 1.0, 1.99), at(1.0))
    assert list(lags_s(ends, ends)) == [0.0, 0.0]


def test_figures_beside_chance() -> None:
    clips = [events(bounce(0, index)) for index in range(12)]
    figures = compare_events(clips)
    assert figures["within_a_frame"] == 1 and figures["lag_frames"] < 0.1
    assert figures["within_a_frame_chance"] < 0.4 and figures["lag_frames_chance"] > 1
    late = [clip(c.bounces_s, c.clicks_s + 2 * FRAME_S) for c in clips]
    assert compare_events(late)["lag_frames"] == pytest.approx(2, abs=0.1)
    assert compare_events(late)["within_a_frame"] < 0.1
    silent = [clip(at(), at()) for _ in clips]
    assert compare_events(silent)["within_a_frame"] == 0
    assert compare_events([]) == {}


def test_a_clip_whose_events_are_at_its_ends_says_nothing_and_one_without_them_missed() -> None:
    inner, ends = clip(at(1.0), at(1.0)), clip(at(0.01, 1.99), at(0.01, 1.99))
    assert compare_events([inner, ends])["within_a_frame"] == 1
    assert compare_events([inner, ends])["events"] == 2
    assert compare_events([ends]) == {}
    for missing in (replace(ends, clicks_s=at()), replace(ends, bounces_s=at())):
        assert compare_events([inner, missing])["within_a_frame"] == pytest.approx(2 / 3)
