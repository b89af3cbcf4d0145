"""The mesh on process groups of megatron-core: a HyperCommGrid of our own, or a program's.

Ranks lie as in the native mesh, which is also megatron-core's order: tp fastest, then cp, then the
data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from kinodit.models.errors import ConfigError
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.core import HyperCommGrid, ProcessGroupCollection
from kinodit.trainer.parallel.mesh import Groups, Mesh, ParallelConfig, place_rank

AXES = ("tp", "heads", "ring", "dp_shard", "dp_replicate")
"""Axes of the grid, the fastest first; heads and ring are the factors of cp."""
EXPERT_AXES = ("tp", "ep", "dp_shard_cp", "dp_replicate")
"""Of the grid of experts' ranks, which megatron-core keeps beside the other as well."""
Find = Callable[[Sequence[str]], ProcessGroup]
"""Axes -> the group of ranks that differ from this one in these alone."""


def build_mesh(
    config: ParallelConfig,
    engine: MegatronConfig,
    world_size: int,
    rank: int,
    device: torch.device,
    collection: ProcessGroupCollection | None = None,
) -> Mesh:
    """The mesh of `world_size` processes, whose process group must exist if there are several.

    collection: groups that a program has already; none are created then

    Raises:
        ConfigError: the collection has no group of the ranks that an axis needs.
    """
    replicate, shard = config.resolve(world_size)
    config.check_ep(shard)
    if world_size == 1:
        return Mesh(device)
    shape = dict(zip(AXES, (config.tp, config.ulysses, config.ring, shard, replicate), strict=True))
    cuts_tokens = engine.sequence_parallel or config.tp == 1

    def finding(shape: Mapping[str, int]) -> Find:
        if collection is None:
            return _from_grid(shape)
        return _from_collection(collection, shape, rank)

    find = finding(shape)
    every = DeviceMesh.from_group(
        [find(["dp_replicate"]), find(["heads", "ring", "dp_shard"]), find(["tp"])],
        device.type,
        torch.arange(world_size).view(replicate, shard * config.cp, config.tp),
        mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"),
    )
    sharing = ["tp", "heads", "ring"] if cuts_tokens else ["heads", "ring"]
    num_shares = config.cp * (config.tp if cuts_tokens else 1)
    groups = Groups(
        heads=find(["heads"]) if config.ulysses > 1 else None,
        ring=find(["ring"]) if config.ring > 1 else None,
        pack=find(sharing) if num_shares > 1 else None,
    )
    placed = place_rank(config, rank, device, every, groups, cuts_tokens=cuts_tokens)
    if config.ep == 1:
        return placed
    sizes = (config.tp, config.ep, shard * config.cp // config.ep, replicate)
    find = finding(dict(zip(EXPERT_AXES, sizes, strict=True)))
    axes = EXPERT_AXES[::-1]
    known = {"dp_replicate": every.get_group(0), "tp": every.get_group(2)}
    experts = DeviceMesh.from_group(
        [known[axis] if axis in known else find([axis]) for axis in axes],
        device.type,
        torch.arange(world_size).view(sizes[::-1]),
        mesh_dim_names=axes,
    )
    return replace(placed, expert_mesh=experts)


def _from_grid(shape: Mapping[str, int]) -> Find:
    grid = HyperCommGrid(list(shape.values()), list(shape))

    def find(axes: Sequence[str]) -> ProcessGroup:
        return cast(ProcessGroup, grid.create_pg(list(axes)))

    return find


def _from_collection(
    collection: ProcessGroupCollection, shape: Mapping[str, int], rank: int
) -> Find:
    known: dict[tuple[int, ...], ProcessGroup] = dict(_groups_of(collection))

    def find(axes: Sequence[str]) -> ProcessGroup:
        ranks = ranks_along(shape, axes, rank)
        if ranks not in known:
            raise ConfigError(
                f"the ProcessGroupCollection that was passed in has no group of ranks "
                f"{list(ranks)}, which {' x '.join(axes)} needs under parallel "
                f"{ {name: size for name, size in shape.items() if size > 1} }: it has "
                f"{sorted(map(list, known))}"
            )
        return known[ranks]

    return find


def ranks_along(shape: Mapping[str, int], axes: Sequence[str], rank: int) -> tuple[int, ...]:
    """The ranks, ascending, that differ from `rank` in the coordinates of `axes` alone."""
    found, stride = {rank}, 1
    for name, size in shape.items():
        if name in axes:
            own = rank // stride % size
            found = {one + (at - own) * stride for one in found for at in range(size)}
        stride *= size
    return tuple(sorted(found))


def _groups_of(collection: ProcessGroupCollection) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(ranks, group) of all groups; of those with the same ranks the later fields win."""
    for field in fields(collection):
        value = getattr(collection, field.name, None)
        for group in value if isinstance(value, list) else [value]:
            if group is not None:
                yield tuple(sorted(dist.get_process_group_ranks(group))), group
