"""When to stop before the last step: signals, and the end of the batch job.

USR1 means save and come back, TERM means save and stay away. A handler only notes the wish; the
ranks agree at a step boundary (`trainer/resilience/guard.py`), and what they agreed on is final: a
signal that arrives during the save changes nothing. This module does not import torch, so that
handlers can be in place before anything slow happens.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

FINISHED_FILE = "finished"
"""In the run's folder once its last step is saved: a restart has nothing to do."""


class Request(IntEnum):
    """What a rank, or all of them, want. The highest wins: who said stop is not requeued."""

    NONE = 0
    REQUEUE = 1
    STOP = 2


class Signals:
    """Notes USR1 and TERM while it is open, and the end of the job whether open or not.

    `ends_at_s` is the end of the batch job on the monotonic `clock` (None: there is none), so that
    a wall clock that jumps is harmless. The run saves `margin_s` before it, or when three quarters
    of what was left at the start are over if that is later: a short job trains, too.
    """

    def __init__(
        self,
        ends_at_s: float | None = None,
        margin_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._received = Request.NONE
        self._before: dict[int, Any] = {}
        self.limit(ends_at_s, margin_s)

    def limit(self, ends_at_s: float | None, margin_s: float) -> None:
        """Set the end of the job; `margin_s` of 0 leaves it to signals."""
        self._save_at_s = None
        if ends_at_s is not None and margin_s > 0:
            left_s = ends_at_s - self._clock()
            self._save_at_s = ends_at_s - min(margin_s, max(left_s, 0.0) / 4)

    @property
    def request(self) -> Request:
        """What this rank wants now."""
        if self._received is Request.NONE and self._save_at_s is not None:
            return Request.REQUEUE if self._clock() >= self._save_at_s else Request.NONE
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        wish = Request.REQUEUE if number == signal.SIGUSR1 else Request.STOP
        self._received = max(self._received, wish)

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread alone; elsewhere the process's owner has them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def requeue_marker(run_dir: Path, job_id: str) -> Path:
    """The file that tells the batch script to requeue the job.

    Exit codes do not survive srun and torchrun, so the script goes by this file alone.
    """
    return run_dir / f"requeue.{job_id}"


def write_marker(path: Path, step: int) -> None:
    """Write a marker whole: the step that is saved. Rank 0, after the save is committed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"step": step}) + "\n")
    temporary.replace(path)


def is_finished(run_dir: Path, steps: int) -> bool:
    """Whether an earlier start saved the last of `steps` steps."""
    try:
        return bool(json.loads((run_dir / FINISHED_FILE).read_text())["step"] >= steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False
