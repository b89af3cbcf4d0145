"""Windows of steps: what is counted of them, and when."""

from __future__ import annotations

import time

import pytest

from kinodit.trainer.metrics import Window


def test_no_time_is_lost_between_two_windows() -> None:
    start = time.perf_counter()
    first = Window(["video"], started_s=start)
    first_s, _ = first.spent()
    time.sleep(0.05)
    second = first.next()
    second_s, activities = second.spent()
    assert second_s >= 0.05 and not activities
    assert first_s + second_s == pytest.approx(second.ended_s - start, abs=1e-9)
    assert second.modalities == ["video"]
