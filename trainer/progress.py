"""What a person sees while a run trains: one live line on a terminal, a line now and then in a log.

The loop calls `step` every step (it only reads the clock) and `metrics` with every row that is
logged; losses and rates are those of the last row, so that nothing waits for the device.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

REDRAW_S = 0.1
LOG_LINE_S = 60.0
"""In a log file a line appears at least this often, however long a step takes."""
LOG_LINES = 20
"""And about this many times in a run that is shorter."""
BAR_WIDTH = 20
_ERASE = "\r\x1b[2K"


class Progress:
    """Progress of rank 0 on `stream`; other ranks pass `enabled=False` and stay silent.

    `every_steps`: in a log, a line each time so many steps are done (0: chosen from the run's
    length). `start_step` is the step a resumed run goes on from. `clock` gives seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        total_steps: int,
        *,
        start_step: int = 0,
        every_steps: int = 0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._total, self._enabled, self._clock = stream, total_steps, enabled, clock
        self._every = every_steps or nice_interval(total_steps)
        self._live = enabled and stream.isatty()
        self._step = self._line_step = start_step
        self._row: Mapping[str, Any] = {}
        self._seconds_per_step = 0.0
        self._last_step_s = self._line_s = clock()
        self._drawn_s = float("-inf")

    def step(self, step: int) -> None:
        """`step` steps are done."""
        now = self._clock()
        done = step - self._step
        if done > 0:
            # Of the order of the last hundred steps, so that the time left follows a change of
            # speed, and counts what saves and samples cost.
            seconds = (now - self._last_step_s) / done
            known = self._seconds_per_step
            self._seconds_per_step = known + (seconds - known) * 0.02 if known else seconds
        self._step, self._last_step_s = step, now
        if self._live and now - self._drawn_s >= REDRAW_S:
            self._draw(now)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl has been written."""
        if not self._enabled:
            return
        if row["kind"] == "validation":
            self.note(_validation_line(row))
            return
        self._row = row
        now = self._clock()
        if self._live:
            self._draw(now)
        elif (
            self._step // self._every > self._line_step // self._every
            or self._step >= self._total
            or now - self._line_s >= LOG_LINE_S
        ):
            self._stream.write(self._text(full=True) + "\n")
            self._stream.flush()
            self._line_step, self._line_s = self._step, now

    def note(self, message: str) -> None:
        """Write a line that stays: a checkpoint, a sampling, a warning."""
        if not self._enabled:
            return
        self._stream.write(f"{_ERASE if self._live else ''}{message}\n")
        self._stream.flush()
        if self._live:
            self._draw(self._clock())

    def close(self) -> None:
        """Leave the last state of the live line on the terminal."""
        if self._live:
            self._draw(self._clock())
            self._stream.write("\n")
            self._stream.flush()
            self._live = False

    def _draw(self, now: float) -> None:
        width = shutil.get_terminal_size().columns
        text = self._text(full=width >= 100)
        self._stream.write(_ERASE + _clip(text, width - 1))
        self._stream.flush()
        self._drawn_s = now

    def _text(self, full: bool) -> str:
        row = self._row
        digits = len(str(self._total))
        parts = [f"step {self._step:>{digits}}/{self._total}"]
        if self._live and full:
            parts.append(bar(self._step / self._total, BAR_WIDTH))
        if row:
            parts.append(f"loss {float(row['loss']):.4f}")
            if "step_s" in row:
                parts.append(rate(1 / max(float(row["step_s"]), 1e-9), "steps"))
            if full and "samples_per_s" in row:
                parts.append(rate(float(row["samples_per_s"]), "samples"))
            if full and "tokens_per_s" in row:
                parts.append(rate(float(row["tokens_per_s"]), "tokens"))
            if "mfu" in row:
                parts.append(f"MFU {100 * float(row['mfu']):.1f}%")
            if "step_s" in row and "data_wait_s" in row:
                share = float(row["data_wait_s"]) / max(float(row["step_s"]), 1e-9)
                parts.append(f"data wait {100 * share:.0f}%")
        if self._seconds_per_step:
            left = (self._total - self._step) * self._seconds_per_step
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)


def nice_interval(total_steps: int) -> int:
    """1, 2 or 5 times a power of ten, such that a run has at most `LOG_LINES` of it."""
    magnitude = 1
    while True:
        for factor in (1, 2, 5):
            if total_steps <= factor * magnitude * LOG_LINES:
                return factor * magnitude
        magnitude *= 10


def bar(share: float, width: int) -> str:
    """A bar of `width` characters, `share` of it filled, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    partial = " ▏▎▍▌▋▊▉"[rest] if rest else ""
    return f"▕{('█' * full + partial).ljust(width)}▏"


def rate(per_second: float, unit: str) -> str:
    """A rate in three digits: "3.2 steps/s", "14 s/step", "9.5k tokens/s"."""
    if per_second <= 0:
        return f"0 {unit}/s"
    if per_second < 0.1:
        return f"{_short(1 / per_second)} s/{unit.removesuffix('s')}"
    return f"{_short(per_second)} {unit}/s"


def duration(seconds: float) -> str:
    """A time span in two units: "2d 04h", "3h 07m", "12:04"."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}h {minute:02d}m" if hours else f"{minutes}:{second:02d}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _validation_line(row: Mapping[str, Any]) -> str:
    losses = [
        f"{key} {float(value):.4f}"
        for key, value in row.items()
        if key.startswith("loss") and isinstance(value, int | float | str)
    ]
    return f"validation at step {row['step']}: {', '.join(losses)}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"
