"""The place of one process among all of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """rank of world_size processes; local_rank counts within the node."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once (logs, reports, manifests)."""
        return self.rank == 0
