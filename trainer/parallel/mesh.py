"""The mesh of ranks: named axes, validated against the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kinodit.models.errors import ConfigError, UserError
from kinodit.trainer.parallel.sequence import Place

T = TypeVar("T")

ALONE = Place(0, 1, 1)


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the mesh axes. dp_replicate x dp_shard x cp is the number of processes.

    dp_replicate: replicas of the (sharded) model; gradients are summed over them
    dp_shard:     ranks with packs of their own among which, together with cp, each parameter is
                  split (FSDP2); -1: all that remain
    cp:           ranks that share each pack, its tokens dealt out over them
    ring:         how many of the cp ranks keys and values travel round; the other factor of cp
                  exchanges heads (Ulysses). 1: Ulysses alone; cp: a ring alone
    reshard_after_forward: free gathered parameters between forward and backward
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    ring: int = 1
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "cp", "ring"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: must be at least 1")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ConfigError(
                f"parallel.dp_shard={self.dp_shard}: must be at least 1, or -1 for all that remain"
            )
        if self.cp % self.ring:
            raise ConfigError(
                f"parallel.ring={self.ring} does not divide parallel.cp={self.cp}: a ring goes "
                "through some or all of the cp ranks"
            )

    @property
    def ulysses(self) -> int:
        """Ranks that exchange heads."""
        return self.cp // self.ring

    def resolve(self, world_size: int) -> tuple[int, int]:
        """(dp_replicate, dp_shard) for `world_size` processes.

        Raises:
            ConfigError: the degrees do not multiply to `world_size`.
        """
        if self.dp_shard != -1:
            product = self.dp_replicate * self.dp_shard * self.cp
            if product != world_size:
                raise ConfigError(
                    f"parallel.dp_replicate={self.dp_replicate} x dp_shard={self.dp_shard} x "
                    f"cp={self.cp} = {product}, but {world_size} process(es) were started: start "
                    f"{product}, or set parallel.dp_shard=-1"
                )
            return self.dp_replicate, self.dp_shard
        fixed = self.dp_replicate * self.cp
        if world_size % fixed:
            raise ConfigError(
                f"parallel.dp_replicate={self.dp_replicate} x cp={self.cp} = {fixed} does not "
                f"divide the {world_size} process(es) that were started"
            )
        return self.dp_replicate, world_size // fixed


@dataclass(frozen=True)
class Mesh:
    """This rank's view of the mesh.

    device_mesh:       (dp_replicate, dp_shard x cp): parameters are sharded over the second axis,
                       gradients summed over both; None in a run of one process
    rank, world_size:  of all processes
    dp_index, dp_size: among the ranks that have packs of their own; cp ranks share an index
    place:             on the context-parallel axis
    heads, ring:       its process groups, None where the axis has one rank
    """

    device: torch.device
    device_mesh: DeviceMesh | None = None
    rank: int = 0
    world_size: int = 1
    dp_index: int = 0
    dp_size: int = 1
    place: Place = ALONE
    heads: ProcessGroup | None = None
    ring: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what one rank has to write."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether this rank counts its pack: one of those that share it does."""
        return self.place.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank. All ranks must call it."""
        tensor = torch.tensor([int(flag)], device=self.device)
        return bool(self.sum(tensor).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank. For small host-side objects."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank. Collective.

        An error for the user on rank 0 is raised on all ranks, so that none is left waiting.
        """
        if self.world_size == 1:
            return function()
        answer: list[tuple[T | None, UserError | None]] = [(None, None)]
        if self.is_main:
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
    """The mesh of `world_size` processes. The process group must exist if there are several.

    Neighbouring ranks share packs, and exchange heads before they share a ring: what talks most is
    nearest.
    """
    replicate, shard = config.resolve(world_size)
    if world_size == 1:
        return Mesh(device)
    device_mesh = init_device_mesh(
        device.type, (replicate, shard * config.cp), mesh_dim_names=("dp_replicate", "dp_shard_cp")
    )
    heads = ring = None
    if config.cp > 1:
        shape = (replicate * shard, config.ring, config.ulysses)
        context = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ring", "heads"))
        heads = context.get_group("heads") if config.ulysses > 1 else None
        ring = context.get_group("ring") if config.ring > 1 else None
    return Mesh(
        device,
        device_mesh,
        rank,
        world_size,
        dp_index=rank // config.cp,
        dp_size=world_size // config.cp,
        place=Place(rank % config.cp, config.ulysses, config.ring),
        heads=heads,
        ring=ring,
    )
