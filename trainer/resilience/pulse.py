"""Signs of life: where a rank is, in a page of memory that its watchdog reads.

The trainer calls `beat` when it goes from one activity to the next, and `message` for each message
to other ranks; without a watchdog both do nothing. The page is shared with a parent process, so
that it can be read whatever state this process is in. Imports no torch.
"""

from __future__ import annotations

import math
import mmap
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from kinodit.data.at_work import AtWork

_SIGN = struct.Struct("<qddqq32s64s")
_PLACE = struct.Struct("<qq1024s")
_SLOT_BYTES = _SIGN.size + 4
_PLACE_OFFSET = 512

START_LIMIT_S = 1800.0
"""How long a process may take to say who it is: imports, and joining the other ranks."""
STEPS_PER_LIMIT = 5.0
"""A step may take so many times the longest that was seen, whatever `hang_s` says."""


@dataclass(frozen=True)
class Sign:
    """The last sign of a rank.

    time_s, limit_s: when it was given, on the monotonic clock, and how long it is good for
    activity, step:  what the rank was about to do
    collective, num_messages: the last message that it began, and how many it had begun by then
    """

    time_s: float
    limit_s: float
    step: int
    num_messages: int
    activity: str
    collective: str


@dataclass(frozen=True)
class Watched:
    """Who a process is. folder: where its watchdog writes reports; "" before it said so."""

    rank: int
    world_size: int
    folder: str


class Page:
    """The shared memory; made before the fork.

    at_work: what threads of the rank note that they are at

    Signs go to two places in turn, each with a checksum: whenever it is read, and wherever a writer
    was stopped, one of them is whole.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.at_work = AtWork()
        self._num_signs = 0
        self.write(Sign(time.monotonic(), START_LIMIT_S, 0, 0, "start", ""))

    def write(self, sign: Sign) -> None:
        """Give a sign of life."""
        fields = (sign.time_s, sign.limit_s, sign.step, sign.num_messages)
        names = (sign.activity.encode()[:32], sign.collective.encode()[:64])
        # Counted, since clocks have steps, and two signs may be of one instant.
        body = _SIGN.pack(self._num_signs, *fields, *names)
        start = self._num_signs % 2 * _SLOT_BYTES
        self._memory[start : start + _SLOT_BYTES] = body + _checksum(body)
        self._num_signs += 1

    def read(self) -> Sign:
        """The last sign of life."""
        while True:
            first, second = self._slot(0), self._slot(1)
            if second is None:
                # The sign before this unfinished one may be newer than what was just read.
                first = self._slot(0)
            signs = [sign for sign in (first, second) if sign is not None]
            if signs:
                return max(signs, key=lambda numbered: numbered[0])[1]

    def _slot(self, turn: int) -> tuple[int, Sign] | None:
        """The sign in one of the two places, and its number; None before it is whole."""
        start = turn * _SLOT_BYTES
        raw = self._memory[start : start + _SLOT_BYTES]
        body = raw[: _SIGN.size]
        if raw[_SIGN.size :] != _checksum(body):
            return None
        number, time_s, limit_s, step, count, activity, collective = _SIGN.unpack(body)
        return number, Sign(time_s, limit_s, step, count, _text(activity), _text(collective))

    def introduce(self, who: Watched) -> None:
        """Say who this process is."""
        place = (who.rank, who.world_size, who.folder.encode()[:1024])
        packed = _PLACE.pack(*place)
        self._memory[_PLACE_OFFSET : _PLACE_OFFSET + len(packed)] = packed

    def who(self) -> Watched:
        """Who the watched process is."""
        rank, world_size, folder = _PLACE.unpack_from(self._memory, _PLACE_OFFSET)
        return Watched(rank, world_size, _text(folder))


def _checksum(body: bytes) -> bytes:
    """Never that of a page that was not written: zeros do not have the checksum zero."""
    return zlib.crc32(body).to_bytes(4, "little")


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


class Pulse:
    """Writes the signs of one rank to its page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.at_work = page.at_work
        self._hang_s = self._slow_s = math.inf
        self._step = self._num_messages = 0
        self._activity, self._collective = "start", ""
        self._limit_s = START_LIMIT_S
        self._step_began_s = math.nan
        self._longest_step_s = math.inf
        self._num_steps = 0

    def watch(self, who: Watched, hang_s: float, slow_s: float) -> None:
        """From here on a step may be silent for `hang_s`, anything else for `slow_s` seconds.

        The first step of a process compiles, connects and allocates: it counts as anything else,
        and so does the second, before which nobody knows how long a step takes.
        """
        self._hang_s, self._slow_s = hang_s or math.inf, slow_s if hang_s else math.inf
        self._limit_s = self._slow_s
        self._page.introduce(who)
        self._give()

    def step(self, step: int) -> None:
        """A step begins."""
        self._end_step()
        self._step, self._step_began_s = step, time.monotonic()
        self.beat("step", slow=False)

    def beat(self, activity: str, *, slow: bool, more_s: float = 0.0) -> None:
        """`activity` begins. slow: it is no part of a step; more_s: how much longer it may take."""
        self._activity = activity
        if slow:
            # What is between steps is no step: its time says nothing about the next one's.
            self._end_step()
        usual_s = max(self._hang_s, STEPS_PER_LIMIT * self._longest_step_s)
        self._limit_s = self._slow_s if slow else min(usual_s + more_s, self._slow_s)
        self._give()

    def _end_step(self) -> None:
        """A step is over, if one was going on; the longest one counts, but for the first."""
        if not math.isnan(self._step_began_s):
            took_s = time.monotonic() - self._step_began_s
            self._num_steps += 1
            if self._num_steps == 2:
                self._longest_step_s = took_s
            elif self._num_steps > 2:
                self._longest_step_s = max(self._longest_step_s, took_s)
        self._step_began_s = math.nan

    def message(self, label: str, kind: str) -> None:
        """A message to other ranks begins."""
        self._num_messages += 1
        self._collective = f"{kind} ({label})"
        self._give()

    def _give(self) -> None:
        self._page.write(
            Sign(
                time.monotonic(),
                self._limit_s,
                self._step,
                self._num_messages,
                self._activity,
                self._collective,
            )
        )


_pulse: Pulse | None = None


def adopt(page: Page) -> None:
    """Let this process, a child of its watchdog, write to `page`."""
    global _pulse
    _pulse = Pulse(page)


def watch(rank: int, world_size: int, folder: Path, hang_s: float, slow_s: float) -> None:
    """See `Pulse.watch`; reports go to `folder`, the same on all ranks."""
    if _pulse is not None:
        _pulse.watch(Watched(rank, world_size, str(folder.absolute())), hang_s, slow_s)


def step(step: int) -> None:
    """See `Pulse.step`."""
    if _pulse is not None:
        _pulse.step(step)


def beat(activity: str, *, slow: bool = False, more_s: float = 0.0) -> None:
    """See `Pulse.beat`."""
    if _pulse is not None:
        _pulse.beat(activity, slow=slow, more_s=more_s)


def message(label: str, kind: str, num_bytes: int) -> None:
    """See `Pulse.message`; a listener of `trainer/parallel/traffic.py`."""
    if _pulse is not None:
        _pulse.message(label, kind)


def at_work() -> AtWork | None:
    """Where threads note what they are at, for the watchdog to read; None where there is none."""
    return None if _pulse is None else _pulse.at_work
