"""What `--part` leaves out."""

from __future__ import annotations

import argparse

import pytest

from tests import conftest


class Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


class Config:
    """As far as the hook looks at one."""

    def __init__(self, part: float) -> None:
        self.part = part
        self.left_out: list[str] = []
        self.hook = self

    def getoption(self, name: str) -> float:
        assert name == "--part"
        return self.part

    def pytest_deselected(self, items: list[Item]) -> None:
        self.left_out += [item.nodeid for item in items]


def drawn(part: float) -> tuple[list[str], list[str]]:
    config, items = Config(part), [Item(f"test_{number}") for number in range(21)]
    conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
    return [item.nodeid for item in items], config.left_out


def test_a_part_is_the_same_tests_at_one_commit_and_the_others_are_said_to_be_left_out() -> None:
    every = [f"test_{number}" for number in range(21)]
    kept, left_out = drawn(0.5)
    assert len(kept) == 11
    assert sorted(kept + left_out) == sorted(every)
    assert kept == [name for name in every if name in kept]
    assert drawn(0.5) == (kept, left_out)
    assert drawn(1.0) == (every, [])


@pytest.mark.parametrize("share", ["0", "1.5", "half"])
def test_shares_that_make_no_sense_are_refused(share: str) -> None:
    assert conftest.share("0.25") == 0.25
    with pytest.raises(argparse.ArgumentTypeError, match="needs a number above 0 and at most 1"):
        conftest.share(share)
