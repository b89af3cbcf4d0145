"""What each figure of a benchmark should be, and the list of figures that is kept as JSON."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Goal:
    """What rows whose name matches `pattern` should reach: at most `value`, or at least."""

    pattern: str
    value: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        """Whether `value` reaches the goal."""
        return value >= self.value if self.at_least else value <= self.value


def goal_of(name: str, goals: tuple[Goal, ...]) -> Goal:
    """The first goal whose pattern matches: every figure has one."""
    return next(goal for goal in goals if fnmatch.fnmatch(name, goal.pattern))


def write_rows(path: Path, figures: Mapping[str, tuple[float, Goal]]) -> None:
    """Write [{"name", "value", "goal", "ok"}, ...], a row for each figure."""
    rows = [
        {"name": name, "value": value, "goal": goal.value, "ok": goal.is_met(value)}
        for name, (value, goal) in figures.items()
    ]
    path.write_text(json.dumps(rows, indent=2) + "\n")
