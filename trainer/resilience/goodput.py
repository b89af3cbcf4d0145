"""Where the time of a run went, over all its starts: RUN/time.jsonl, and what follows from it.

A line of the file is one window of logged steps of one start; nothing is ever removed, so that
steps which were taken twice are seen to be. Goodput is productive over wall time:

    productive   computing and encoding of steps that count, and evaluations and samples of theirs
    data wait    a step waited for its samples
    saves        training stood still for a checkpoint
    lost steps   taken, and taken again after a restart or a rollback
    startup      from a process's start to its first step: imports, joining, building, loading
    down         from the last sign of one start to the process of the next
    other        the rest of the time between the first and the last line
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinodit.trainer.jsonl import JsonLines, read_rows

TIME_FILE = "time.jsonl"
PRODUCTIVE = ("compute", "encode", "eval")


@dataclass(frozen=True)
class Spent:
    """One window. start: number of the process's start; from_step, to_step: steps done at its ends.

    time_s: unix time at its end; elapsed_s: how long it was; seconds: by activity, within that
    """

    start: int
    from_step: int
    to_step: int
    time_s: float
    elapsed_s: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Opened:
    """One start (or return to a checkpoint) of a run.

    step: that it goes on from; process_s, time_s: unix time of the process's start and of the
    start of its first step. For a rollback both are when it was decided on, and when it was over.
    """

    start: int
    step: int
    process_s: float
    time_s: float


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they were spent on; see the module's text."""

    productive_s: float = 0.0
    data_wait_s: float = 0.0
    saves_s: float = 0.0
    lost_steps_s: float = 0.0
    startup_s: float = 0.0
    down_s: float = 0.0
    other_s: float = 0.0
    num_starts: int = 0
    num_lost_steps: int = 0

    @property
    def wall_s(self) -> float:
        """Everything between the first start and the last line."""
        parts = (self.productive_s, self.data_wait_s, self.saves_s, self.lost_steps_s)
        return sum(parts) + self.startup_s + self.down_s + self.other_s

    @property
    def share(self) -> float:
        """Productive over wall time; nan for a run without either."""
        return self.productive_s / self.wall_s if self.wall_s > 0 else float("nan")

    @property
    def share_without_startup(self) -> float:
        """The same where starting processes cost nothing."""
        wall_s = self.wall_s - self.startup_s
        return self.productive_s / wall_s if wall_s > 0 else float("nan")


def account(opened: Sequence[Opened], windows: Sequence[Spent]) -> Goodput:
    """What the lines of a run add up to, both in the order in which they were written."""
    parts: dict[str, float] = dict.fromkeys(
        ("productive_s", "data_wait_s", "saves_s", "lost_steps_s", "startup_s", "down_s"), 0.0
    )
    parts["other_s"] = 0.0
    lost_steps = 0
    # Wall clocks may be set back between two starts; no time is ever negative.
    last_sign_s: float | None = None
    for index, begin in enumerate(opened):
        ours = [window for window in windows if window.start == begin.start]
        # What a later start begins from, or the latest of all, if it is earlier.
        kept_until = min((later.step for later in opened[index + 1 :]), default=None)
        if last_sign_s is not None:
            parts["down_s"] += max(0.0, begin.process_s - last_sign_s)
        parts["startup_s"] += max(0.0, begin.time_s - begin.process_s)
        for window in ours:
            kept, lost = _kept(window, kept_until)
            lost_steps += round(lost * (window.to_step - window.from_step))
            named = 0.0
            for activity, seconds in window.seconds.items():
                named += seconds
                if activity in PRODUCTIVE:
                    parts["productive_s"] += kept * seconds
                    parts["lost_steps_s"] += lost * seconds
                elif activity == "data":
                    parts["data_wait_s"] += seconds
                elif activity == "checkpoint":
                    parts["saves_s"] += seconds
                else:
                    parts["other_s"] += seconds
            parts["other_s"] += max(0.0, window.elapsed_s - named)
        last_sign_s = ours[-1].time_s if ours else begin.time_s
    return Goodput(**parts, num_starts=len(opened), num_lost_steps=lost_steps)


def _kept(window: Spent, kept_until: int | None) -> tuple[float, float]:
    """Shares of a window's steps that count and that were lost."""
    steps = window.to_step - window.from_step
    if kept_until is None or steps == 0 or window.to_step <= kept_until:
        return 1.0, 0.0
    kept = max(0, kept_until - window.from_step) / steps
    return kept, 1.0 - kept


def read_goodput(run_dir: Path) -> Goodput | None:
    """The account of the run in a folder; None if it keeps none."""
    path = run_dir / TIME_FILE
    if not path.is_file():
        return None
    opened, windows = _parse(row for row in read_rows(path) if row is not None)
    return account(opened, windows)


def _parse(rows: Iterable[dict[str, Any]]) -> tuple[list[Opened], list[Spent]]:
    opened, windows = [], []
    for row in rows:
        kind = row.pop("kind")
        if kind == "opened":
            opened.append(Opened(**row))
        else:
            windows.append(Spent(**row))
    return opened, windows


class Ledger:
    """Writes RUN/time.jsonl, and knows what the run adds up to. Rank 0 only.

    `process_s`: unix time at which this start began.
    """

    def __init__(self, run_dir: Path, step: int, process_s: float) -> None:
        path = run_dir / TIME_FILE
        rows = read_rows(path) if path.is_file() else ()
        self._opened, self._windows = _parse(row for row in rows if row is not None)
        self._file = JsonLines(path)
        self._start = len(self._opened) + 1
        self._step, self._process_s = step, process_s
        self._total: Goodput | None = None

    def begin(self) -> None:
        """The first step begins."""
        opened = Opened(self._start, self._step, self._process_s, time.time())
        self._opened.append(opened)
        self._file.append({"kind": "opened", **asdict(opened)})
        # Of earlier starts nothing changes any more: their lines become one sum.
        self._total = account(self._opened, self._windows)

    def add(self, step: int, elapsed_s: float, seconds: Mapping[str, float]) -> None:
        """A window ends: `step` steps are done."""
        assert self._total is not None, "no step has begun"
        window = Spent(self._start, self._step, step, time.time(), elapsed_s, dict(seconds))
        self._step = step
        self._file.append({"kind": "window", **asdict(window)})
        self._total = _plus(self._total, window)

    @property
    def goodput(self) -> Goodput:
        """The account so far."""
        return self._total or account(self._opened, self._windows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plus(total: Goodput, window: Spent) -> Goodput:
    """`total` with one more window, of the latest start."""
    more = account([Opened(window.start, 0, 0.0, 0.0)], [window])
    fields = {name: value + getattr(more, name) for name, value in asdict(total).items()}
    return Goodput(**{**fields, "num_starts": total.num_starts})


def process_start_s() -> float:
    """Unix time at which this process started; now, where the kernel does not tell."""
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        # The name of the process, in brackets, may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.time()
    return time.time() - (uptime_s - started_s)
