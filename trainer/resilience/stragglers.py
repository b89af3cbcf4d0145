"""Which rank the others wait for: each rank's own time per step, beside what it waited.

On a CPU the time that the training thread did not compute in is waiting for other ranks. On an
accelerator the host runs ahead of the device, so only the wait at the step's agreement is seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("busy_s", "data_wait_s", "collective_wait_s")
DATA_WAIT = COLUMNS.index("data_wait_s")
NUM_LISTED = 4
"""Ranks that a row names, the busiest first."""


@dataclass(frozen=True)
class RankTime:
    """Seconds per step of one rank: its own work, waiting for samples, waiting for ranks."""

    rank: int
    busy_s: float
    data_wait_s: float
    collective_wait_s: float


def own_time(
    seconds: Mapping[str, float], cpu_s: float, agreement_wait_s: float, device: torch.device
) -> tuple[float, float, float]:
    """This rank's columns, summed over a window.

    seconds: wall time by activity; cpu_s: CPU time of the training thread within "compute"
    """
    compute_s = seconds.get("compute", 0.0)
    waited_s = compute_s - cpu_s if device.type == "cpu" else agreement_wait_s
    waited_s = min(max(0.0, waited_s), compute_s)
    busy_s = compute_s - waited_s + seconds.get("encode", 0.0)
    return busy_s, seconds.get("data", 0.0), waited_s


def table(own: tuple[float, float, float], rank: int, world_size: int) -> Tensor:
    """[world_size, 3] float64: this rank's row; the sum over ranks is everyone's."""
    rows = torch.zeros(world_size, len(COLUMNS), dtype=torch.float64)
    rows[rank] = torch.tensor(own, dtype=torch.float64)
    return rows


def report(rows: Sequence[Sequence[float]], num_steps: int) -> dict[str, object]:
    """Keys of a row of metrics: the busiest ranks, and how far the first is above the median.

    `rows` are the columns of every rank, summed over `num_steps` steps.
    """
    times = [RankTime(rank, *(value / num_steps for value in row)) for rank, row in enumerate(rows)]
    usual_s = statistics.median(time.busy_s for time in times)
    listed = sorted(times, key=lambda time: (-time.busy_s - time.data_wait_s, time.rank))
    return {
        "slowest_over_median": max(t.busy_s for t in times) / usual_s if usual_s > 0 else 1.0,
        "collective_wait_s": statistics.median(time.collective_wait_s for time in times),
        "ranks": [vars(time) for time in listed[:NUM_LISTED]],
    }
