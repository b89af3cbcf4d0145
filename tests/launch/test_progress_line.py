"""The line that tells how far long work has come."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from kinodit.launch.progress_line import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, unit: str, steps: list[tuple[float, int]]) -> str:
    """The line after `steps` (seconds, done of 200)."""
    clock = iter([0.0, *(seconds for seconds, _ in steps)])
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("kinodit.launch.progress_line.time", fake)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = ProgressLine(unit)
    for _, done in steps:
        line.show(done, 200, "12 samples")
    return terminal.getvalue().rpartition("\x1b[K")[2]


def test_a_line_tells_how_far_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, "MiB", [(1.0, 0), (11.0, 50)])
    assert text == "[######..................] 50/200 MiB  5 MiB/s  12 samples  30 s left"
    # What an earlier run had done says nothing of the pace.
    text = shown(monkeypatch, "MiB", [(0.0, 150), (10.0, 160)])
    assert text.endswith("160/200 MiB  1 MiB/s  12 samples  40 s left")
    text = shown(monkeypatch, "files", [(0.0, 0), (100.0, 1)])
    assert text == (
        "[........................] 1/200 files  100 s/file  12 samples  5 h 31 min left"
    )
    text = shown(monkeypatch, "samples", [(0.0, 0), (0.1, 100)])
    assert text.endswith("100/200 samples  1k samples/s  12 samples  0 s left")
    text = shown(monkeypatch, "samples", [(0.0, 0), (100.0, 100)])
    assert text.endswith("1 min 40 s left")


def test_nothing_is_shown_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ProgressLine("MiB")
    line.show(1, 1, "")
    line.end()
    assert capsys.readouterr().err == ""
