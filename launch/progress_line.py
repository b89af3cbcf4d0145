"""One line that tells how far long work has come."""

from __future__ import annotations

import sys
import time

from kinodit.trainer.progress import rate

_BAR_CHARS = 24


class ProgressLine:
    """One line on stderr, rewritten at most ten times a second; nothing if that is no terminal.

    `unit` follows the counts ("MiB"), and a rate in it is shown.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._shown = False

    def show(self, done: int, total: int, note: str) -> None:
        """Shows how many of `total` are done, how fast, and how long the rest will take."""
        now = time.monotonic()
        if self._first is None:
            # What was done before, by an earlier run say, tells nothing of the pace.
            self._first, self._start = done, now
        if not sys.stderr.isatty() or (now - self._last < 0.1 and done < total):
            return
        self._last, self._shown = now, True
        elapsed_s, fresh = now - self._start, done - self._first
        parts = [f"{_bar(done, total)} {done}/{total} {self._unit}"]
        if fresh and elapsed_s:
            parts.append(rate(fresh / elapsed_s, self._unit))
        if note:
            parts.append(note)
        if fresh:
            parts.append(f"{_duration(elapsed_s / fresh * (total - done))} left")
        print(f"\r\x1b[K{'  '.join(parts)}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class StageLines:
    """A line for each stage of long work, one after the other; silent where `is_shown` is false."""

    def __init__(self, unit: str, *, is_shown: bool = True) -> None:
        """`unit`: of what every stage counts."""
        self._unit, self._is_shown = unit, is_shown
        self._stage = ""
        self._line = ProgressLine(unit)

    def show(self, stage: str, done: int, total: int) -> None:
        """Shows how far `stage` has come: its pace is its own."""
        if not self._is_shown:
            return
        if stage != self._stage:
            self._line.end()
            self._stage, self._line = stage, ProgressLine(self._unit)
        self._line.show(done, total, stage)

    def end(self) -> None:
        """Clears the line."""
        self._line.end()


def _bar(done: int, total: int) -> str:
    filled = _BAR_CHARS * done // total if total else _BAR_CHARS
    return f"[{'#' * filled}{'.' * (_BAR_CHARS - filled)}]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
