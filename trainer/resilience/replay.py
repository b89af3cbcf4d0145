"""A run's policy on a simulated clock: what a trace of interruptions would leave of its time.

The replay writes the lines that a run writes (`trainer/resilience/goodput.py`) and adds them up by
the same function, so that what it calls goodput is what a run reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kinodit.models.random import generator
from kinodit.trainer.resilience.goodput import Goodput, Opened, Spent, account

DAY_S = 86_400.0


@dataclass(frozen=True)
class Costs:
    """What a fault costs, in seconds, as measured.

    step_s:     one step
    save_s:     training stands still for a save
    write_s:    until an asynchronous save is complete, and can be gone back to
    detect_s:   until a hang is found and all ranks are ended; a crash is seen at once
    down_s:     from the end of the ranks to new processes (requeue, health checks)
    startup_s:  from a process's start to its first step (imports, joining, loading)
    """

    step_s: float
    save_s: float
    write_s: float
    detect_s: float
    down_s: float
    startup_s: float


@dataclass(frozen=True)
class Interruption:
    """When, in seconds of wall time; planned: told ahead, so that the run saves; hang: silent."""

    time_s: float
    planned: bool = False
    hang: bool = False


def trace(
    days: float, unexpected: int, planned: int, hangs: float, seed: int
) -> list[Interruption]:
    """Interruptions spread evenly at random (a Poisson process, given its counts).

    hangs: share of the unexpected ones that do not crash but hang.
    """
    draws = generator("interruptions", seed)
    times = draws.uniform(0, days * DAY_S, unexpected + planned)
    silent = draws.uniform(size=unexpected) < hangs
    kinds = [Interruption(float(t), hang=bool(h)) for t, h in zip(times, silent, strict=False)]
    kinds += [Interruption(float(t), planned=True) for t in times[unexpected:]]
    return sorted(kinds, key=lambda interruption: interruption.time_s)


def save_interval_s(costs: Costs, mean_s: float) -> float:
    """How long to train between two saves where an interruption comes every `mean_s` seconds.

    sqrt(2 * save_s * mean_s) loses least (Young 1974, doi 10.1145/361147.361115). Not less than
    `write_s`, since one save is in flight at most.
    """
    return max(math.sqrt(2 * costs.save_s * mean_s), costs.write_s)


def replay(
    interruptions: Sequence[Interruption], days: float, costs: Costs, every_steps: int
) -> Goodput:
    """Goodput of `days` of a run that saves every so many steps.

    An interruption during a restart begins it anew.
    """
    end_s = days * DAY_S
    period_s = every_steps * costs.step_s + costs.save_s
    opened: list[Opened] = []
    windows: list[Spent] = []
    process_s, step, start = 0.0, 0, 0
    for interruption in [*interruptions, Interruption(end_s, planned=True)]:
        begin_s = process_s + costs.startup_s
        stop_s = min(interruption.time_s, end_s)
        if stop_s <= begin_s:
            # Struck while it was down or starting: nothing was gained, and it starts again.
            if stop_s > process_s:
                process_s = stop_s + costs.down_s
            continue
        start += 1
        opened.append(Opened(start, step, process_s, begin_s))
        trained_s = stop_s - begin_s
        periods, rest_s = divmod(trained_s, period_s)
        num_saves = int(periods)
        steps = num_saves * every_steps + int(
            min(rest_s, every_steps * costs.step_s) / costs.step_s
        )
        silent_s = costs.detect_s if interruption.hang else 0.0
        saved_s = num_saves * costs.save_s
        compute_s = trained_s - saved_s
        if interruption.planned:
            # It is told, saves, and loses nothing.
            saved_s += costs.save_s + costs.write_s
            kept = steps
        else:
            # A save that was still being written is no checkpoint yet.
            complete = num_saves - int(num_saves > 0 and rest_s < costs.write_s)
            kept = complete * every_steps
        elapsed_s = compute_s + saved_s + silent_s
        now_s = begin_s + elapsed_s
        seconds = {"compute": compute_s, "checkpoint": saved_s}
        windows.append(Spent(start, step, step + steps, now_s, elapsed_s, seconds))
        step += kept
        process_s = now_s + costs.down_s
    return account(opened, windows)
