"""The place of one process among all of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """The batch job that a process belongs to.

    id:           "local" without one
    ends_at_s:    when its time is up, on the monotonic clock; None: no limit, or it is not known
    num_restarts: how often it was requeued
    """

    id: str = "local"
    ends_at_s: float | None = None
    num_restarts: int = 0


@dataclass(frozen=True)
class Topology:
    """rank of world_size processes; local_rank counts within the node, which has ranks_per_node.

    ranks_per_node: of the first node, if they differ; 0 if the launcher does not say
    """

    rank: int
    world_size: int
    local_rank: int
    job: Job = Job()
    ranks_per_node: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once (logs, reports, manifests)."""
        return self.rank == 0
