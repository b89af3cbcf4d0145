"""What threads are at, and since when, in memory that a process shares with its parent.

A thread cannot be ended. Where one hangs in C, all that can be done is to say over what: its
process can, if the interpreter still runs there, and a parent that made the notes before it forked
can in any case. Imports no torch.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NUM_PLACES = 64
"""So many threads at once have notes; what others are at is not known."""

_BODY = struct.Struct("<d496s")
_THREAD = struct.Struct("<Q")
_PLACE_BYTES = _THREAD.size + _BODY.size


@dataclass(frozen=True)
class Note:
    """What a thread is at. since_s: on the monotonic clock; thread: as `threading.get_ident`."""

    thread: int
    since_s: float
    what: str

    def told(self, now_s: float) -> str:
        """In words, with the thread's number as `faulthandler` prints it."""
        return f"{self.what} for {now_s - self.since_s:.1f} s in thread 0x{self.thread:016x}"


class AtWork:
    """Notes of the threads of one process. Threads share it, and a parent that it was made in."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, NUM_PLACES * _PLACE_BYTES)
        self._free = list(range(NUM_PLACES))

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Within it, this thread is at `what`."""
        try:
            place = self._free.pop() * _PLACE_BYTES
        except IndexError:
            yield
            return
        text = what.encode()[: _BODY.size - 8]
        _BODY.pack_into(self._memory, place + _THREAD.size, time.monotonic(), text)
        # Last, since it makes a note of what is there.
        _THREAD.pack_into(self._memory, place, threading.get_ident())
        try:
            yield
        finally:
            _THREAD.pack_into(self._memory, place, 0)
            self._free.append(place // _PLACE_BYTES)

    def read(self) -> list[Note]:
        """The notes of now, the oldest first; of any process that shares the memory."""
        found = []
        for place in range(0, NUM_PLACES * _PLACE_BYTES, _PLACE_BYTES):
            (thread,) = _THREAD.unpack_from(self._memory, place)
            since_s, text = _BODY.unpack_from(self._memory, place + _THREAD.size)
            if thread:
                what = text.rstrip(b"\0").decode(errors="ignore")
                found.append(Note(thread, since_s, what))
        return sorted(found, key=lambda note: note.since_s)
