"""What `--seconds` leaves out, and in which order it runs the rest."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import pytest

from tests import conftest

ROOT = Path("/root")


class Config:
    """As far as the hooks look at one."""

    rootpath = ROOT

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.stash = pytest.Stash()

    def getoption(self, name: str) -> float:
        assert name == "--seconds"
        return self.seconds


class Item:
    """Test `number` of a file."""

    def __init__(self, config: Config, file: str, number: int) -> None:
        self.config, self.path, self.number = config, ROOT / file, number


def order(seconds: float) -> list[tuple[str, int]]:
    config = Config(seconds)
    items: Any = [Item(config, file, number) for file in "abcdefgh" for number in range(9)]
    conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
    return [(item.path.name, item.number) for item in items]


def test_a_limit_makes_another_order_of_the_same_tests_and_keeps_files_together() -> None:
    unlimited = order(math.inf)
    assert unlimited == [(file, number) for file in "abcdefgh" for number in range(9)]
    limited = order(60.0)
    assert limited != unlimited and sorted(limited) == unlimited
    assert limited == order(60.0)
    files = [file for file, _ in limited]
    assert all(len(set(files[start : start + 9])) == 1 for start in range(0, 72, 9))
    assert files[::9] != list("abcdefgh")
    assert any([number for _, number in limited[i : i + 9]] != list(range(9)) for i in (0, 9))


@pytest.mark.parametrize(("spent_s", "begins"), [(1.0, True), (61.0, False)])
def test_nothing_begins_after_the_time_is_up(spent_s: float, begins: bool) -> None:
    config = Config(60.0)
    config.stash[conftest.STARTED_S] = time.monotonic() - spent_s
    item: Any = Item(config, "a", 0)
    if begins:
        conftest.pytest_runtest_setup(item)
        return
    with pytest.raises(pytest.skip.Exception, match=conftest.TURN):
        conftest.pytest_runtest_setup(item)


@pytest.mark.parametrize("text", ["0", "-5", "inf", "nan", "long"])
def test_durations_that_make_no_sense_are_refused(text: str) -> None:
    assert conftest.seconds("0.25") == 0.25
    with pytest.raises(argparse.ArgumentTypeError, match="needs a number of seconds above 0"):
        conftest.seconds(text)
