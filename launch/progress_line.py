"""One line that tells how far long work has come."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """One line on stderr, rewritten at most ten times a second; nothing if that is no terminal."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._shown = False

    def show(self, done: int, total: int, note: str) -> None:
        """Shows how many of `total` are done and how long the rest will take."""
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self._last < 0.1 and done < total):
            return
        self._last, self._shown = now, True
        left_s = (now - self._start) / done * (total - done)
        text = f"{done}/{total}  {note}  {left_s:.0f} s left"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
