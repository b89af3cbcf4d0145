"""The live line fits its terminal and tells what the rows say; a log gets few lines."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest

from kinodit.trainer.progress import Progress, bar, duration, nice_interval, rate

ROW = {
    "kind": "train",
    "step": 40,
    "loss": 0.43214,
    "step_s": 0.5,
    "data_wait_s": 0.05,
    "samples_per_s": 37.0,
    "tokens_per_s": 9472.0,
    "mfu": 0.412,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def wide(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(
        "kinodit.trainer.progress.shutil.get_terminal_size",
        lambda: os.terminal_size((columns, 24)),
    )


def shown(stream: io.StringIO) -> str:
    """What the last redraw leaves on the terminal's current line."""
    return stream.getvalue().split("\x1b[2K")[-1]


def drive(progress: Progress, clock: Clock, steps: range, row: dict[str, Any] = ROW) -> None:
    for step in steps:
        clock.now += 0.5
        progress.step(step)
        if step % 10 == 0:
            progress.metrics(row | {"step": step})


def test_live_line_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch, 160)
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, 100, clock=clock)
    drive(progress, clock, range(1, 41))
    assert shown(stream) == (
        "step  40/100  ▕████████            ▏  loss 0.4321  2 steps/s  37 samples/s  "
        "9.47k tokens/s  MFU 41.2%  data wait 10%  left 0:30"
    )
    progress.close()
    assert stream.getvalue().endswith("\n") and stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("columns", [20, 60, 80, 99, 100, 130])
def test_live_line_never_wraps(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    wide(monkeypatch, columns)
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, 1_000_000, clock=clock)
    drive(progress, clock, range(1, 41), ROW | {"loss": 123456.789})
    assert all(len(line) < columns for line in stream.getvalue().split("\r\x1b[2K"))


def test_live_line_is_redrawn_at_most_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch, 120)
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, 10_000, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.001
        progress.step(step)
    assert 9 <= stream.getvalue().count("\r") <= 11


def test_notes_stay_above_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch, 120)
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, 100, clock=clock)
    drive(progress, clock, range(1, 11))
    progress.note("saved step-00000010")
    assert "\r\x1b[2Ksaved step-00000010\n\r\x1b[2Kstep  10/100" in stream.getvalue()


def test_a_log_gets_a_line_every_so_many_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, 100, every_steps=20, clock=clock)
    drive(progress, clock, range(1, 101))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "20/100",
        "40/100",
        "60/100",
        "80/100",
        "100/100",
    ]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert "loss 0.4321" in lines[0] and "left 0:40" in lines[0]


def test_a_log_of_slow_steps_gets_a_line_a_minute() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, 100_000, clock=clock)
    for step in range(1, 31):
        clock.now += 10.0
        progress.step(step)
        progress.metrics(ROW | {"step": step})
    assert len(stream.getvalue().splitlines()) == 5


def test_validation_is_a_line() -> None:
    stream = io.StringIO()
    progress = Progress(stream, 100)
    bins = {"video": {"0.1": 0.2}}
    progress.metrics({"kind": "validation", "step": 20, "loss/video": 0.25, "bins": bins})
    assert stream.getvalue() == "validation at step 20: loss/video 0.2500\n"


def test_a_resumed_run_counts_its_own_steps_for_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, 100, start_step=60, every_steps=10, clock=clock)
    drive(progress, clock, range(61, 71))
    assert "left 0:15" in stream.getvalue()


def test_the_time_left_follows_a_change_of_speed() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, 2000, every_steps=1000, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.1 if step <= 500 else 1.0
        progress.step(step)
    progress.metrics(ROW)
    minutes = int(stream.getvalue().split("left ")[1].split(":")[0])
    assert 15 <= minutes <= 17


def test_a_loss_that_is_not_a_number_is_shown() -> None:
    stream = io.StringIO()
    progress = Progress(stream, 10, every_steps=1)
    progress.step(1)
    progress.metrics({"kind": "train", "step": 1, "loss": "NaN"})
    assert "loss nan" in stream.getvalue()


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch, 120)
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, 100, enabled=False, clock=clock)
    drive(progress, clock, range(1, 101))
    progress.note("saved")
    progress.close()
    assert stream.getvalue() == ""


def test_formats() -> None:
    assert rate(3.14159, "steps") == "3.14 steps/s"
    assert rate(0.07, "steps") == "14.3 s/step"
    assert rate(999.7, "tokens") == "1k tokens/s"
    assert rate(123_456, "tokens") == "123k tokens/s"
    assert rate(0.0, "steps") == "0 steps/s"
    assert [duration(s) for s in (5, 724, 11_220, 187_200)] == ["0:05", "12:04", "3h 07m", "2d 04h"]
    assert [nice_interval(n) for n in (1, 20, 100, 101, 2000, 100_000)] == [1, 1, 5, 10, 100, 5000]
    assert bar(0.0, 4) == "▕    ▏" and bar(1.0, 4) == "▕████▏" and bar(0.5, 3) == "▕█▌ ▏"
