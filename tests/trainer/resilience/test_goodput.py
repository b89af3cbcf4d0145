"""Every second of a run is accounted for once, whatever happened to it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from kinodit.trainer.resilience.goodput import (
    Goodput,
    Ledger,
    Opened,
    Spent,
    account,
    process_start_s,
    read_goodput,
)


def window(start: int, first: int, last: int, ends_s: float, **seconds: float) -> Spent:
    elapsed_s = sum(seconds.values())
    return Spent(start, first, last, ends_s, elapsed_s, seconds)


def test_a_run_that_was_killed_and_went_on() -> None:
    opened = [Opened(1, 0, 100.0, 105.0), Opened(2, 10, 160.0, 163.0)]
    windows = [
        window(1, 0, 10, 126.0, compute=18.0, data=2.0, checkpoint=1.0),
        window(1, 10, 20, 146.0, compute=16.0, encode=2.0, data=2.0),
        window(2, 10, 20, 184.0, compute=20.0, eval=1.0),
    ]
    found = account(opened, windows)
    assert found.productive_s == 18.0 + 21.0
    assert found.lost_steps_s == 18.0
    assert (found.data_wait_s, found.saves_s) == (4.0, 1.0)
    assert (found.startup_s, found.down_s) == (8.0, 14.0)
    assert (found.num_starts, found.num_lost_steps) == (2, 10)
    assert found.wall_s == pytest.approx(184.0 - 100.0)
    assert found.share == pytest.approx(39 / 84)
    assert found.share_without_startup == pytest.approx(39 / 76)


def test_a_window_that_straddles_the_checkpoint_counts_in_part() -> None:
    opened = [Opened(1, 0, 0.0, 0.0), Opened(2, 4, 10.0, 10.0)]
    found = account(opened, [window(1, 0, 10, 10.0, compute=10.0)])
    assert (found.productive_s, found.lost_steps_s, found.num_lost_steps) == (4.0, 6.0, 6)


def test_steps_lost_to_a_later_return_are_lost() -> None:
    # The second start went on from 10; the third had to go back to 5.
    opened = [Opened(n, step, 0.0, 0.0) for n, step in ((1, 0), (2, 10), (3, 5))]
    windows = [window(1, 0, 10, 0.0, compute=10.0), window(2, 10, 12, 0.0, compute=2.0)]
    assert account(opened, windows).lost_steps_s == 5.0 + 2.0


def test_a_clock_that_was_set_back_makes_no_negative_time() -> None:
    opened = [Opened(1, 0, 1000.0, 1001.0), Opened(2, 1, 500.0, 499.0)]
    found = account(opened, [window(1, 0, 1, 1002.0, compute=1.0)])
    assert (found.down_s, found.startup_s) == (0.0, 1.0)


def test_what_no_activity_names_is_other() -> None:
    found = account([Opened(1, 0, 0.0, 0.0)], [Spent(1, 0, 1, 5.0, 5.0, {"compute": 3.0})])
    assert (found.productive_s, found.other_s) == (3.0, 2.0)


def test_the_ledger_knows_what_its_file_says(tmp_path: Path) -> None:
    assert read_goodput(tmp_path) is None
    for step in (0, 6):
        ledger = Ledger(tmp_path, step, time.time() - 2.0)
        assert ledger.goodput.num_starts == (0 if step == 0 else 1)
        ledger.begin()
        for done in (2, 4, 8):
            ledger.add(step + done, 3.0, {"compute": 2.0, "data": 0.5, "checkpoint": 0.25})
        assert vars(ledger.goodput) == pytest.approx(vars(read_goodput(tmp_path)))
        ledger.close()
    found = read_goodput(tmp_path)
    assert found is not None
    assert found.num_starts == 2
    assert found.num_lost_steps == 2
    # A line that a kill cut short is passed over.
    with (tmp_path / "time.jsonl").open("a") as file:
        file.write('{"kind": "win')
    assert read_goodput(tmp_path) == found


def test_nothing_is_no_share() -> None:
    assert math.isnan(Goodput().share)


def test_the_process_started_before_now() -> None:
    assert time.time() - 3600 < process_start_s() < time.time()
