"""The mesh of ranks: named axes, validated against the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kinodit.models.errors import ConfigError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the mesh axes. Their product must be the number of processes.

    dp_replicate: replicas of the (sharded) model; gradients are summed over them
    dp_shard:     ranks among which each parameter is split (FSDP2); -1: all that remain
    reshard_after_forward: free gathered parameters between forward and backward
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.dp_replicate < 1:
            raise ConfigError(f"parallel.dp_replicate={self.dp_replicate}: must be at least 1")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ConfigError(
                f"parallel.dp_shard={self.dp_shard}: must be at least 1, or -1 for all that remain"
            )

    def resolve(self, world_size: int) -> tuple[int, int]:
        """(dp_replicate, dp_shard) for `world_size` processes.

        Raises:
            ConfigError: the degrees do not multiply to `world_size`.
        """
        if self.dp_shard != -1:
            product = self.dp_replicate * self.dp_shard
            if product != world_size:
                raise ConfigError(
                    f"parallel.dp_replicate={self.dp_replicate} x dp_shard={self.dp_shard} = "
                    f"{product}, but {world_size} process(es) were started: start {product}, or "
                    f"set parallel.dp_shard=-1"
                )
            return self.dp_replicate, self.dp_shard
        if world_size % self.dp_replicate:
            raise ConfigError(
                f"parallel.dp_replicate={self.dp_replicate} does not divide the {world_size} "
                f"process(es) that were started"
            )
        return self.dp_replicate, world_size // self.dp_replicate


@dataclass(frozen=True)
class Mesh:
    """This rank's view of the mesh; `device_mesh` is None in a run of one process."""

    device: torch.device
    device_mesh: DeviceMesh | None
    dp_index: int
    dp_size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the data-parallel ranks, in place."""
        if self.dp_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank. All ranks must call it."""
        tensor = torch.tensor([int(flag)], device=self.device)
        return bool(self.sum(tensor).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.dp_size > 1:
            dist.barrier()

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank. For small host-side objects."""
        if self.dp_size == 1:
            return [value]
        values: list[T | None] = [None] * self.dp_size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank. Collective.

        An error for the user on rank 0 is raised on all ranks, so that none is left waiting.
        """
        if self.dp_size == 1:
            return function()
        answer: list[tuple[T | None, UserError | None]] = [(None, None)]
        if self.dp_index == 0:
            try:
                answer = [(function(), None)]
            except UserError as error:
                answer = [(None, error)]
        dist.broadcast_object_list(answer, src=0)
        value, failure = answer[0]
        if failure is not None:
            raise failure
        return cast(T, value)


def build_mesh(config: ParallelConfig, world_size: int, rank: int, device: torch.device) -> Mesh:
    """The mesh of `world_size` processes. The process group must exist if there are several."""
    replicate, shard = config.resolve(world_size)
    if world_size == 1:
        return Mesh(device, None, 0, 1)
    device_mesh = init_device_mesh(
        device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    return Mesh(device, device_mesh, rank, world_size)
