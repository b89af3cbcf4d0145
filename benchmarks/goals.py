"""What each figure of a benchmark should be, and the list of figures that is kept as JSON."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A figure, and whether it is what it should be. size: the same in absolute terms."""

    name: str
    value: float
    goal: float
    ok: bool
    size: str = ""

    @classmethod
    def exactly(cls, name: str, value: float, goal: float, size: str = "") -> Row:
        """A figure that has to be `goal`."""
        return cls(name, value, goal, value == goal, size)

    @classmethod
    def at_most(cls, name: str, value: float, goal: float, size: str = "") -> Row:
        """A figure that must not be above `goal`."""
        return cls(name, value, goal, value <= goal, size)

    @classmethod
    def at_least(cls, name: str, value: float, goal: float, size: str = "") -> Row:
        """A figure that must not be below `goal`."""
        return cls(name, value, goal, value >= goal, size)

    @classmethod
    def near(cls, name: str, value: float, goal: float, tolerance: float, size: str = "") -> Row:
        """A figure that may be off by `tolerance`, either way."""
        return cls(name, value, goal, abs(value - goal) <= tolerance, size)

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {"name": self.name, "value": self.value, "goal": self.goal, "ok": self.ok}


@dataclass(frozen=True)
class Goal:
    """What rows whose name matches `pattern` should reach: at most `value`, or at least."""

    pattern: str
    value: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        """Whether `value` reaches the goal."""
        return value >= self.value if self.at_least else value <= self.value

    def row(self, name: str, value: float) -> Row:
        """The row of a figure with this goal."""
        return Row(name, value, self.value, self.is_met(value))


def goal_of(name: str, goals: tuple[Goal, ...]) -> Goal:
    """The first goal whose pattern matches: every figure has one."""
    return next(goal for goal in goals if fnmatch.fnmatch(name, goal.pattern))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write [{"name", "value", "goal", "ok"}, ...]."""
    path.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")


def show(rows: Iterable[Row], unit: str, json_file: Path | None) -> None:
    """Print each row as it comes, write all as JSON if asked. `unit`: what sizes are.

    Raises:
        SystemExit: a row misses its goal.
    """
    print(f"{'row':40s} {'value':>10s} {'goal':>10s}       {unit}")
    shown = []
    for row in rows:
        shown.append(row)
        verdict = "ok" if row.ok else "NO"
        print(
            f"{row.name:40s} {row.value:10.6f} {row.goal:10.6f}   {verdict}  {row.size}", flush=True
        )
    if json_file is not None:
        write_rows(json_file, shown)
    missed = [row.name for row in shown if not row.ok]
    if missed:
        raise SystemExit(f"these rows miss their goal: {', '.join(missed)}")
