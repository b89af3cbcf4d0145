"""RUN/events.jsonl: what happened to a run, one line each, never removed.

Imports no torch: the watchdog writes here too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from kinodit.trainer.jsonl import JsonLines
from kinodit.trainer.redact import redact_text, secret_values

EVENTS_FILE = "events.jsonl"

EventKind = Literal[
    "start",
    "resume",
    "checkpoint",
    "sample",
    "skip",
    "quarantine",
    "rollback",
    "hang",
    "crash",
    "corruption",
    "stop",
    "warning",
]


def event_row(
    kind: EventKind, step: int, message: str, secrets: Iterable[str]
) -> dict[str, str | int | float]:
    """A line of the file, without the credentials that `message` may contain."""
    return {
        "kind": "event",
        "time_s": time.time(),
        "step": step,
        "event": kind,
        "message": redact_text(message, secrets),
    }


def append_event(run_dir: Path, kind: EventKind, step: int, message: str) -> None:
    """Write an event while no `Sinks` is open. Rank 0, or the watchdog in its place."""
    events = JsonLines(run_dir / EVENTS_FILE)
    events.append(event_row(kind, step, message, secret_values(os.environ)))
    events.close()
