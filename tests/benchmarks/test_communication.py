"""Figures of communication that the documentation quotes, on fewer blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.quick import quick

Import = Callable[[str], Any]


@pytest.mark.parametrize(
    "case",
    quick(
        [
            *("tp", "ulysses", "ring", "hybrid", "fsdp", "hsdp", "all"),
            *("hsdp/accumulate", "tp/recompute"),
        ],
        "tp",
        "ring",
        "fsdp",
    ),
)
def test_bytes_and_messages_are_the_least(case: str, benchmark_module: Import) -> None:
    communication = benchmark_module("communication")
    rows = {
        row.name: row for row in communication.rows_of(case, depth=2) if "share" not in row.name
    }
    assert {f"{case}/bytes", f"{case}/messages"} <= rows.keys()
    assert {name: row.value for name, row in rows.items()} == dict.fromkeys(rows, 1.0)


@pytest.mark.slow
def test_lengths_that_do_not_divide(benchmark_module: Import) -> None:
    communication = benchmark_module("communication")
    (num_bytes, messages) = communication.rows_of("tp/odd", depth=1)
    # 56,923 tokens in 8 parts of 7,116; after the last attention only video, 56,697 in 7,088.
    expected = 8 * (7116 + 3 * 7088) / (56923 + 3 * 56697)
    assert num_bytes.value == pytest.approx(expected, abs=1e-11)
    assert num_bytes.ok and messages.value == 1.0


def test_a_row_that_misses_its_goal_fails_the_run(
    benchmark_module: Import, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    communication = benchmark_module("communication")
    sent_twice = benchmark_module("goals").Row.exactly("tp/bytes", 2.0, 1.0, "2 GiB")
    monkeypatch.setattr(communication, "rows_of", lambda name, depth: [sent_twice])
    monkeypatch.setattr(sys, "argv", ["communication.py", "--cases", "tp"])
    with pytest.raises(SystemExit, match="tp/bytes"):
        communication.main()
    assert "NO" in capsys.readouterr().out
