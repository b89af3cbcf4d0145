"""Sound and picture that change together, and figures of clips in which they do not."""

from __future__ import annotations

import numpy as np
import pytest

from kinodit.models.random import generator
from kinodit.trainer.evaluation.change import Changes, compare_changes, lag_frames
from kinodit.trainer.evaluation.distance import Features


def curve(*moments: int, count: int = 20) -> Features:
    """Changes at these moments, and a little everywhere."""
    values = np.asarray(generator("changes", *moments).uniform(0, 0.1, count))
    values[list(moments)] += 1
    return values


@pytest.mark.parametrize("shift", [-6, -1, 0, 2, 7])
def test_the_shift_of_the_sound_is_found(shift: int) -> None:
    assert lag_frames(curve(8, 11), curve(8 + shift, 11 + shift)) == shift
    assert lag_frames(3 + 40 * curve(8, 11), 0.2 * curve(8 + shift, 11 + shift)) == shift


def test_of_several_shifts_the_least_counts_and_it_reaches_half_of_the_clip() -> None:
    beats = np.tile([1.0, 0.0, 0.0, 0.0], 5)
    assert lag_frames(beats, beats) == 0
    assert lag_frames(curve(1, count=8), curve(5, count=8)) == 4
    found = lag_frames(curve(1, count=8), curve(7, count=8))
    assert found is not None and abs(found) <= 4


def test_what_never_changes_more_has_no_moment() -> None:
    assert lag_frames(np.full(6, 0.3), curve(2, count=6)) is None
    assert lag_frames(curve(2, count=6), np.zeros(6)) is None


def test_figures_beside_chance() -> None:
    together = [Changes(curve(at), curve(at)) for at in (4, 9, 14)]
    figures = compare_changes(together)
    assert figures["lag_frames"] == 0 and figures["within_a_frame"] == 1
    # With the next clip's sound: 5 frames later twice, 10 earlier once.
    assert figures["lag_frames_chance"] == 5 and figures["within_a_frame_chance"] == 0
    silent = [*together, Changes(curve(4), np.zeros(20)), Changes(curve(5), np.zeros(20))]
    assert compare_changes(silent)["within_a_frame"] == 3 / 5
    assert compare_changes(silent[3:])["lag_frames"] == 21
    late = [Changes(curve(at), curve(at + 2)) for at in (4, 9)]
    assert compare_changes(late)["lag_frames"] == 2
    assert compare_changes([]) == {}
