"""What benchmarks that need no devices share: a pretended process group, rows and their table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def pretended_group(rank: int, world_size: int) -> Iterator[None]:
    """A process group whose collectives send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Row:
    """value: equal to `goal`, or at most that if not `exact`; size: the same in absolute terms."""

    name: str
    value: float
    goal: float
    size: str
    exact: bool = True

    @property
    def ok(self) -> bool:
        """Whether the goal is reached."""
        return self.value == self.goal if self.exact else self.value <= self.goal

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {"name": self.name, "value": self.value, "goal": self.goal, "ok": self.ok}


def show(rows: Iterable[Row], unit: str, json_file: Path | None) -> None:
    """Print each row as it comes, write all as JSON if asked.

    Raises:
        SystemExit: a row misses its goal.
    """
    print(f"{'row':36s} {'value':>10s} {'goal':>10s}       {unit}")
    shown = []
    for row in rows:
        shown.append(row)
        verdict = "ok" if row.ok else "NO"
        print(
            f"{row.name:36s} {row.value:10.6f} {row.goal:10.6f}   {verdict}  {row.size}", flush=True
        )
    if json_file is not None:
        json_file.write_text(json.dumps([row.to_json() for row in shown], indent=2) + "\n")
    missed = [row.name for row in shown if not row.ok]
    if missed:
        raise SystemExit(f"these rows miss their goal: {', '.join(missed)}")
