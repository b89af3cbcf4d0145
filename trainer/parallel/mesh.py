"""The mesh of ranks: named axes, validated against the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kinodit.models.errors import ConfigError, UserError
from kinodit.trainer.parallel.sequence import Place
from kinodit.trainer.parallel.traffic import CONTROL, note, others_share

T = TypeVar("T")

ALONE = Place(0, 1, 1)


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the mesh axes. dp_replicate x dp_shard x cp x tp is the number of processes.

    dp_replicate: replicas of the (sharded) model; gradients are summed over them
    dp_shard:     ranks with packs of their own among which, together with cp, each parameter is
                  split (FSDP2); -1: all that remain
    cp:           ranks that share each pack, its tokens dealt out over them
    ring:         how many of the cp ranks keys and values travel round; the other factor of cp
                  exchanges heads (Ulysses). 1: Ulysses alone; cp: a ring alone
    tp:           ranks among which matrices are split by heads and hidden units, and the tokens of
                  a cp rank dealt out once more everywhere else (tensor and sequence parallelism)
    ep:           ranks of dp_shard x cp that have the experts of the model between them; its tokens
                  travel to theirs
    reshard_after_forward: free gathered parameters between forward and backward
    prefetch:     blocks whose parameters are gathered ahead of the one that computes; in the
                  backward at least one
    cpu_offload:  keep parameters, gradients and optimizer state in host memory, where the update
                  runs too; needs an accelerator for the rest
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    ring: int = 1
    tp: int = 1
    ep: int = 1
    reshard_after_forward: bool = True
    prefetch: int = 1
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "cp", "ring", "tp", "ep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: must be at least 1")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ConfigError(
                f"parallel.dp_shard={self.dp_shard}: must be at least 1, or -1 for all that remain"
            )
        if self.prefetch < 0:
            raise ConfigError(f"parallel.prefetch={self.prefetch}: must not be negative")
        if self.cp % self.ring:
            raise ConfigError(
                f"parallel.ring={self.ring} does not divide parallel.cp={self.cp}: a ring goes "
                "through some or all of the cp ranks"
            )

    def check_ep(self, dp_shard: int) -> None:
        """Refuse an ep axis that does not fit into dp_shard x cp, with `dp_shard` resolved.

        Raises:
            ConfigError: with the numbers.
        """
        if dp_shard * self.cp % self.ep:
            raise ConfigError(
                f"parallel.ep={self.ep} must divide parallel.dp_shard={dp_shard} x cp={self.cp} = "
                f"{dp_shard * self.cp}, the ranks that it deals experts out to"
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
            product = self.dp_replicate * self.dp_shard * self.cp * self.tp
            if product != world_size:
                raise ConfigError(
                    f"parallel.dp_replicate={self.dp_replicate} x dp_shard={self.dp_shard} x "
                    f"cp={self.cp} x tp={self.tp} = {product}, but {world_size} process(es) were "
                    f"started: start {product}, or set parallel.dp_shard=-1"
                )
            return self.dp_replicate, self.dp_shard
        fixed = self.dp_replicate * self.cp * self.tp
        if world_size % fixed:
            raise ConfigError(
                f"parallel.dp_replicate={self.dp_replicate} x cp={self.cp} x tp={self.tp} = "
                f"{fixed} does not divide the {world_size} process(es) that were started"
            )
        return self.dp_replicate, world_size // fixed


def placement_warning(config: ParallelConfig, ranks_per_node: int) -> str:
    """What to say of an axis that does not stay inside nodes of so many ranks; "" if all do.

    Groups are of neighbouring ranks: they stay inside if their size divides the node's. 0 ranks
    per node: not known.
    """
    inner = [
        (f"parallel.tp={config.tp}", config.tp, "tokens cross it four times in every block"),
        (
            f"parallel.tp={config.tp} x {config.ulysses} ranks that exchange heads",
            config.tp * config.ulysses,
            "q, k, v and the output cross it in every block; a larger parallel.ring lets keys and "
            "values cross while others compute",
        ),
        (
            f"parallel.tp={config.tp} x cp={config.cp}",
            config.tp * config.cp,
            "keys and values cross it in every block, while others compute",
        ),
    ]
    for name, size, what in inner:
        if size > 1 and ranks_per_node % size:
            found = "" if size == config.tp else f" = {size} ranks"
            return (
                f"{name}{found} do not fit evenly into a node of {ranks_per_node}, so they talk "
                f"over the network: {what}"
            )
    return ""


@dataclass(frozen=True)
class Mesh:
    """This rank's view of the mesh.

    device_mesh:       (dp_replicate, dp_shard x cp): parameters are sharded over the second axis,
                       gradients summed over both; None in a run of one process
    tp_mesh:           the ranks that parameters are split over; None where there is one
    rank, world_size:  of all processes
    dp_index, dp_size: among the ranks that have packs of their own; cp and tp ranks share an index
    place:             among the ranks that share a pack
    heads, ring:       process groups of the cp axis, None where there is one rank
    pack:              process group of all ranks that share a pack, None where there is one rank
    expert_mesh:       (dp_replicate, dp_shard x cp / ep, ep, tp) of the experts' parameters; None
                       where every rank has all experts
    """

    device: torch.device
    device_mesh: DeviceMesh | None = None
    tp_mesh: DeviceMesh | None = None
    rank: int = 0
    world_size: int = 1
    dp_index: int = 0
    dp_size: int = 1
    place: Place = ALONE
    heads: ProcessGroup | None = None
    ring: ProcessGroup | None = None
    pack: ProcessGroup | None = None
    expert_mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what one rank has to write."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether this rank counts its pack: one of those that share it does."""
        return self.place.share == self.place.copy == 0

    def tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """[len(values)] on this rank's device, without waiting for what the device does."""
        on_cuda = self.device.type == "cuda"
        host = torch.tensor(values, dtype=dtype, pin_memory=on_cuda)
        return host.to(self.device, non_blocking=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            note(CONTROL, "all_reduce", 2 * others_share(tensor, self.world_size))
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

    Neighbouring ranks split matrices, then exchange heads, then share a ring: what talks most is
    nearest.
    """
    replicate, shard = config.resolve(world_size)
    config.check_ep(shard)
    if world_size == 1:
        return Mesh(device)
    every = init_device_mesh(
        device.type,
        (replicate, shard * config.cp, config.tp),
        mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"),
    )
    experts = None
    if config.ep > 1:
        shape = (replicate, shard * config.cp // config.ep, config.ep, config.tp)
        axes = ("dp_replicate", "dp_shard_cp", "ep", "tp")
        experts = init_device_mesh(device.type, shape, mesh_dim_names=axes)
    heads = ring = pack = None
    if config.cp > 1:
        shape = (replicate * shard, config.ring, config.ulysses, config.tp)
        context = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ring", "heads", "tp"))
        heads = context.get_group("heads") if config.ulysses > 1 else None
        ring = context.get_group("ring") if config.ring > 1 else None
    num_shares = config.cp * config.tp
    if num_shares > 1:
        sharing = init_device_mesh(
            device.type, (replicate * shard, num_shares), mesh_dim_names=("dp", "pack")
        )
        pack = sharing.get_group("pack")
    placed = place_rank(config, rank, device, every, Groups(heads, ring, pack))
    return replace(placed, expert_mesh=experts)


@dataclass(frozen=True)
class Groups:
    """Process groups of ranks that share a pack, see `Mesh`; None where there is one rank."""

    heads: ProcessGroup | None
    ring: ProcessGroup | None
    pack: ProcessGroup | None


def place_rank(
    config: ParallelConfig,
    rank: int,
    device: torch.device,
    every: DeviceMesh,
    groups: Groups,
    *,
    cuts_tokens: bool = True,
) -> Mesh:
    """The view of one of several ranks. every: (dp_replicate, dp_shard_cp, tp) of all.

    cuts_tokens: whether tp ranks have tokens of their own (sequence parallelism)
    """
    world_size = every.size()
    num_shares = config.cp * config.tp
    dp_index, share = divmod(rank, num_shares)
    index, tp_index = divmod(share, config.tp)
    own = Place(index, config.ulysses, config.ring, tp_index, config.tp)
    if not cuts_tokens:
        own = Place(index, config.ulysses, config.ring, copies=config.tp, copy=tp_index)
    return Mesh(
        device,
        every["dp_replicate", "dp_shard_cp"],
        every["tp"] if config.tp > 1 else None,
        rank,
        world_size,
        dp_index=dp_index,
        dp_size=world_size // num_shares,
        place=own,
        heads=groups.heads,
        ring=groups.ring,
        pack=groups.pack,
    )
