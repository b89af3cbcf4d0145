"""The report's section about time: goodput by what it was lost to, and the ranks' own times."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from kinodit.launch.report.read import Row, Run, number
from kinodit.trainer.progress import duration
from kinodit.trainer.resilience.goodput import Goodput, read_goodput

PARTS = {
    "productive_s": ("productive", "steps that count, evaluations and samples"),
    "data_wait_s": ("data wait", "steps that waited for their samples"),
    "saves_s": ("saves", "training stood still for a checkpoint"),
    "lost_steps_s": ("lost steps", "taken, and taken again after a restart"),
    "startup_s": ("start-up", "from a process's start to its first step"),
    "down_s": ("down", "no process was training"),
    "other_s": ("other", "between the steps"),
}
"""Fields of `Goodput`: how they are called, and what they mean."""


def percent(share: float) -> str:
    """A share as a person reads it; a dash where there is none."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def time_section(run: Run) -> dict[str, Any] | None:
    """What the page shows of a run's time; None where the run kept no account."""
    goodput = read_goodput(run.folder)
    if goodput is None or goodput.wall_s <= 0:
        return None
    return {
        "goodput": percent(goodput.share),
        "without_startup": percent(goodput.share_without_startup),
        "wall": duration(goodput.wall_s),
        "parts": _parts(goodput),
        "counts": counts(run, goodput),
        "ranks": _ranks(run.train),
    }


def _parts(goodput: Goodput) -> list[dict[str, str]]:
    seconds = asdict(goodput)
    return [
        {
            "key": key.removesuffix("_s"),
            "label": label,
            "hint": hint,
            "time": duration(seconds[key]) if seconds[key] >= 1 else f"{seconds[key]:.1f} s",
            "percent": percent(seconds[key] / goodput.wall_s),
            "width": f"{100 * seconds[key] / goodput.wall_s:.3f}",
        }
        for key, (label, hint) in PARTS.items()
        if seconds[key] > 0
    ]


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def counts(run: Run, goodput: Goodput) -> list[tuple[str, int]]:
    """How often what happened; what never did is left out."""
    kinds = [row["event"] for row in run.events]
    skipped = sum(int(number(row.get("skipped_steps", 0))) for row in run.train)
    every = [
        ("starts", goodput.num_starts),
        ("steps taken twice", goodput.num_lost_steps),
        ("steps refused", skipped),
        ("rollbacks", kinds.count("rollback")),
        ("hangs", kinds.count("hang")),
        ("crashes", kinds.count("crash")),
    ]
    return [(label, count) for label, count in every if count]


def _ranks(rows: list[Row]) -> list[dict[str, str]]:
    """The busiest ranks of the last row, where there are several ranks."""
    last = rows[-1] if rows else {}
    ranks = last.get("ranks")
    if not isinstance(ranks, list) or len(ranks) < 2:
        return []
    return [
        {
            "rank": str(entry.get("rank")),
            "busy": _short(number(entry.get("busy_s"))),
            "data": _short(number(entry.get("data_wait_s"))),
            "wait": _short(number(entry.get("collective_wait_s"))),
        }
        for entry in ranks
        if isinstance(entry, dict)
    ]
