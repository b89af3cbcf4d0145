"""Restarts that get no further come to an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinodit.trainer.resilience.errors import CrashLoopError
from kinodit.trainer.resilience.starts import STARTS_FILE, record_start


def test_exactly_so_many_restarts_without_progress(tmp_path: Path) -> None:
    for _ in range(4):
        record_start(tmp_path, "7", 100, max_fruitless=3)
    with pytest.raises(CrashLoopError, match="4 starts in a row came no further than step 100"):
        record_start(tmp_path, "7", 100, max_fruitless=3)


def test_progress_and_another_job_count_anew(tmp_path: Path) -> None:
    for step in (0, 0, 0, 100, 100, 100, 100, 200):
        record_start(tmp_path, "7", step, max_fruitless=3)
    for _ in range(4):
        record_start(tmp_path, "8", 200, max_fruitless=3)
    record_start(tmp_path, "9", 200, max_fruitless=3)


def test_falling_back_is_no_progress(tmp_path: Path) -> None:
    for step in (300, 200, 100, 100):
        record_start(tmp_path, "7", step, max_fruitless=3)
    with pytest.raises(CrashLoopError):
        record_start(tmp_path, "7", 100, max_fruitless=3)


def test_zero_is_no_limit_and_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    for _ in range(9):
        record_start(tmp_path, "7", 0, max_fruitless=0)
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('{"job": "7", "st')
    record_start(tmp_path, "7", 1, max_fruitless=3)
