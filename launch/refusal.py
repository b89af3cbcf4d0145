"""Telling a mistake once, however many ranks were started with it.

Every rank reads the same recipe and meets the same mistake. Rank 0 tells it; the others compare
theirs with what rank 0 wrote, in torchrun's store or in the file of the batch script, and speak up
only where theirs is another one or rank 0 has none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from kinodit.launch.topology import error_file, launched_rank, launcher_store
from kinodit.models.errors import UserError

WAIT_S = 10.0
"""How long a rank waits for rank 0 to meet the same mistake."""
POLL_S = 0.1
KEY = "refusal"


def tell(error: UserError, *, lasting: bool, stream: TextIO | None = None) -> None:
    """Print `error` on `stream` (default: stderr) if this rank is the one to do so.

    lasting: another start would meet it again, which the batch script is to know
    """
    stream = sys.stderr if stream is None else stream
    rank, message = launched_rank(), str(error)
    _leave_for_torchrun(message)
    if rank in (None, 0):
        print(f"error: {message}", file=stream, flush=True)
        if rank == 0:
            _publish(message)
    elif _is_known(message):
        return
    else:
        print(f"error on rank {rank}: {message}", file=stream, flush=True)
    if lasting:
        _leave_for_batch_script(message)


def _publish(message: str) -> None:
    with _unreachable_ignored():
        store = launcher_store(WAIT_S)
        if store is not None:
            store.set(KEY, message)


def _is_known(message: str) -> bool:
    """Whether rank 0 says the same before long. False where ranks have no way to compare."""
    with _unreachable_ignored():
        store = launcher_store(WAIT_S)
        if store is not None:
            told = store.get(KEY)  # waits for it
            return bool(told.decode() == message)
    path = _note()
    if path is None:
        return False
    return _comes_true(lambda: path.is_file() and path.read_text() == _line(message))


def _comes_true(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        with suppress(OSError):
            if condition():
                return True
        time.sleep(POLL_S)
    return False


def _unreachable_ignored() -> suppress:
    """Whoever does not answer has nothing to say; DistError is a RuntimeError."""
    return suppress(RuntimeError, UserError)


def _leave_for_torchrun(message: str) -> None:
    """Put the message where torchrun's own report of the failure looks for a traceback."""
    path = error_file()
    if path is not None:
        with suppress(OSError):
            path.write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def _leave_for_batch_script(message: str) -> None:
    """Leave the message for the batch script: the exit code of one rank does not get past srun."""
    path = _note()
    if path is not None:
        with suppress(OSError):
            path.write_text(_line(message))


def _note() -> Path | None:
    path = os.environ.get("KINODIT_REFUSAL")
    return Path(path) if path else None


def _line(message: str) -> str:
    return message + "\n"
