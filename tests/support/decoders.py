"""Decoders that hang or crash in C, in the processes that decode."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kinodit.data import fork_server


def hold() -> None:
    """Hangs with the interpreter's lock held: no thread of the process runs any more."""
    ctypes.PyDLL(None).pause()


def release() -> None:
    """Hangs without the interpreter's lock, as FFmpeg does."""
    ctypes.CDLL(None).pause()


def crash() -> None:
    """Reads where there is no memory."""
    ctypes.string_at(0)


def snail() -> None:
    """Goes on for longer than a test, in Python."""
    time.sleep(3600)


HARMS: dict[str, Callable[[], None]] = {
    "hold": hold,
    "release": release,
    "crash": crash,
    "snail": snail,
}


@contextmanager
def struck(
    monkeypatch: pytest.MonkeyPatch, target: str, is_bad: Callable[..., bool], harm: str
) -> Iterator[None]:
    """Within it, `target` does harm in new processes whenever `is_bad` says so of its arguments."""
    module, _, name = target.rpartition(".")
    real = getattr(__import__(module, fromlist=[name]), name)

    def strikes(*args: Any, **options: Any) -> Any:
        if is_bad(*args):
            HARMS[harm]()
        return real(*args, **options)

    fork_server.stop()
    monkeypatch.setattr("kinodit.data.killable.GRACE_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(target, strikes)
        # The server, and what it forks, have what is patched now; this process must not meet it.
        fork_server.fork_early()
    yield
    fork_server.stop()
    fork_server.fork_early()
