"""Memory that a process fills and its parent keeps: what lies in it is handed over, not copied.

A room is used again once nobody in the parent has any part of it. Who fills it cannot make it
smaller (it is sealed): reading what is no longer there would end the parent.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

SPARE = 1.25
"""How much larger than asked for a room may be that is used again."""
STALE_TURNS = 32
"""A free room that so many others were taken before, and each room once, is let go."""
MAX_HELD = 1000
"""Rooms of one process that are in use. What is beyond them, in a large cache of small samples say,
is copied: a process may have some ten thousands of mappings, and other threads have theirs."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Room:
    """`memory` of one answer; `number` names it on both sides."""

    def __init__(self, number: int, descriptor: int, num_bytes: int) -> None:
        self.number = number
        self.memory = mmap.mmap(descriptor, num_bytes)
        self.left_at = 0


class Rooms:
    """The rooms of a process, on its parent's side. For one thread; others may let go of parts."""

    def __init__(self) -> None:
        self._free: list[Room] = []
        self._gone: list[int] = []
        self._num_made = 0
        self._num_gone = 0
        self._turn = 0

    @property
    def num_made(self) -> int:
        """Rooms so far."""
        return self._num_made

    def take(self, num_bytes: int) -> tuple[Room, int]:
        """A room of at least `num_bytes`, and a descriptor if it is new (to be closed), else -1."""
        self._turn += 1
        while self._free and self._turn - self._free[0].left_at > STALE_TURNS + self._num_there:
            self._gone.append(self._free.pop(0).number)
            self._num_gone += 1
        # From the end: what was used last is nearest, and other threads add behind it.
        for place in range(len(self._free) - 1, -1, -1):
            if num_bytes <= len(self._free[place].memory) <= SPARE * num_bytes:
                return self._free.pop(place), -1
        self._num_made += 1
        descriptor = os.memfd_create("kinodit-room", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return Room(self._num_made, descriptor, num_bytes), descriptor
        except OSError:
            os.close(descriptor)
            raise

    @property
    def _num_there(self) -> int:
        return self._num_made - self._num_gone

    def gone(self) -> list[int]:
        """Numbers of rooms that were let go since this was asked; the process can drop them."""
        gone, self._gone = self._gone, []
        return gone

    def leave(self, room: Room) -> None:
        """Nobody needs what is in it. Any thread may say so."""
        room.left_at = self._turn
        self._free.append(room)

    def hand_over(self, room: Room) -> NDArray[np.uint8]:
        """All bytes of a room, flat; it is left when this array and all views of it are gone.

        A copy of them, and it is left at once, if `MAX_HELD` others are in use.
        """
        whole = np.frombuffer(room.memory, np.uint8)
        if self._num_there - len(self._free) > MAX_HELD:
            copied = whole.copy()
            self.leave(room)
            return copied
        weakref.finalize(whole, self.leave, room).atexit = False
        return whole
