"""Stops a run that is started again and again and gets no further."""

from __future__ import annotations

import time
from pathlib import Path

from kinodit.trainer.jsonl import JsonLines, read_rows
from kinodit.trainer.resilience.errors import CrashLoopError

STARTS_FILE = "starts.jsonl"


def record_start(run_dir: Path, job_id: str, step: int, max_fruitless: int) -> int:
    """Note that the job starts from the checkpoint of `step` (0: none); how many starts there were.

    Rank 0, under the lock.

    A start is fruitless if the next one of the same job finds no later checkpoint. Another job is
    somebody's new decision, and counts anew.

    Raises:
        CrashLoopError: the last `max_fruitless` restarts were fruitless (0: never raised).
    """
    path = run_dir / STARTS_FILE
    rows = [row for row in read_rows(path) if row is not None] if path.is_file() else []
    fruitless = 0
    for row in reversed(rows):
        if row["job"] != job_id or row["step"] < step:
            break
        fruitless += 1
    # The first of them was no restart.
    if max_fruitless and fruitless > max_fruitless:
        raise CrashLoopError(
            f"not started: {fruitless} starts in a row came no further than step {step} "
            f"(resilience.max_fruitless_restarts={max_fruitless}). {run_dir / 'events.jsonl'} and "
            f"the job's output say why; once that is mended, submit a new job, or remove {path}"
        )
    starts = JsonLines(path)
    starts.append({"job": job_id, "step": step, "time_s": time.time()})
    starts.close()
    return len(rows) + 1
