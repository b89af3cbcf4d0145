"""The simulated clock loses what it should lose, to the second."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kinodit.trainer.resilience.replay import (
    DAY_S,
    Costs,
    Interruption,
    replay,
    save_interval_s,
    trace,
)

FREE = Costs(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
COSTS = Costs(step_s=1.0, save_s=1.0, write_s=5.0, detect_s=30.0, down_s=10.0, startup_s=20.0)
DAY = DAY_S


def test_a_day_without_interruptions_pays_for_its_saves_alone() -> None:
    assert replay([], 1.0, FREE, 100).share == 1.0
    found = replay([], 1.0, COSTS, 99)
    assert found.startup_s == 20.0
    assert found.saves_s == pytest.approx((DAY - 20) / 100, abs=7.0)
    assert (found.lost_steps_s, found.down_s) == (0.0, 0.0)


@pytest.mark.parametrize("hang", [False, True])
def test_a_crash_loses_what_was_not_saved(hang: bool) -> None:
    # 20 s of start-up, then 10 periods of 99 steps and a save, then 50 steps.
    found = replay([Interruption(20.0 + 1000.0 + 50.0, hang=hang)], 1.0, COSTS, 99)
    assert found.num_lost_steps == 50
    assert found.lost_steps_s == pytest.approx(50.0, rel=0.01)
    assert (found.down_s, found.startup_s) == (10.0, 40.0)
    assert found.other_s == pytest.approx(30.0 if hang else 0.0, abs=1e-6)


def test_a_save_that_is_still_being_written_is_no_checkpoint() -> None:
    assert replay([Interruption(20.0 + 1000.0 + 4.0)], 1.0, COSTS, 99).num_lost_steps == 99 + 4
    assert replay([Interruption(20.0 + 1000.0 + 6.0)], 1.0, COSTS, 99).num_lost_steps == 6


def test_what_was_planned_loses_no_step() -> None:
    found = replay([Interruption(20.0 + 1000.0 + 50.0, planned=True)], 1.0, COSTS, 99)
    assert (found.num_lost_steps, found.num_starts) == (0, 2)


def test_an_interruption_of_a_restart_begins_it_anew() -> None:
    found = replay([Interruption(1000.0), Interruption(1015.0)], 1.0, COSTS, 99)
    assert found.num_starts == 2
    assert found.wall_s == pytest.approx(DAY, abs=10.0)


def test_the_trace_has_what_was_asked_for() -> None:
    found = trace(54.0, 419, 47, 0.1, seed=0)
    assert len(found) == 466
    assert sum(i.planned for i in found) == 47
    assert 20 < sum(i.hang for i in found) < 65
    assert found == sorted(found, key=lambda i: i.time_s)
    assert found == trace(54.0, 419, 47, 0.1, seed=0)
    assert found[0].time_s >= 0 and found[-1].time_s < 54 * DAY


def test_saving_as_often_as_said_loses_less_than_more_or_less_often() -> None:
    costs = Costs(step_s=1.0, save_s=20.0, write_s=25.0, detect_s=30.0, down_s=10.0, startup_s=20.0)
    mean_s = 6 * 3600.0
    interruptions = trace(100.0, unexpected=400, planned=0, hangs=0.0, seed=1)
    best_s = save_interval_s(costs, mean_s)
    assert best_s == pytest.approx(929.5, abs=0.1)
    shares = [replay(interruptions, 100.0, costs, round(k * best_s)).share for k in (0.4, 1, 2.5)]
    assert shares[1] == max(shares)
    assert save_interval_s(replace(costs, write_s=2000.0), mean_s) == 2000.0
