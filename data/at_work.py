"""What threads are at, and since when, in memory that a process shares with its parent.

A thread cannot be ended. Where one hangs in C, all that can be done is to say over what: its
process can, if the interpreter still runs there, and a parent that made the notes before it forked
can in any case. Imports no torch.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from threading import get_ident

NUM_PLACES = 64
"""So many threads at once have notes; what others are at is not known."""

_NOTE = struct.Struct("<Q496sd")
"""The time is last, and written last: a place without one has no note."""
_TIME = struct.Struct("<d")
_TIME_OFFSET = _NOTE.size - _TIME.size
_TEXT_BYTES = 496


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
        self._memory = mmap.mmap(-1, NUM_PLACES * _NOTE.size)
        self._free = list(range(0, NUM_PLACES * _NOTE.size, _NOTE.size))

    def begin(self, what: str) -> int:
        """This thread is at `what` from here on, until `end` is given what this returns."""
        try:
            place = self._free.pop()
        except IndexError:
            return -1
        note = get_ident(), what.encode()[:_TEXT_BYTES], time.monotonic()
        _NOTE.pack_into(self._memory, place, *note)
        return place

    def end(self, place: int) -> None:
        """What was begun is over."""
        if place >= 0:
            _TIME.pack_into(self._memory, place + _TIME_OFFSET, 0.0)
            self._free.append(place)

    def read(self) -> list[Note]:
        """The notes of now, the oldest first; of any process that shares the memory."""
        found = []
        for thread, text, since_s in _NOTE.iter_unpack(self._memory[:]):
            if since_s:
                what = text.rstrip(b"\0").decode(errors="ignore")
                found.append(Note(thread, since_s, what))
        return sorted(found, key=lambda note: note.since_s)
