"""Bytes of parameters, gradients, optimizer state and averages on a rank: exact.

A parameter is split over tp as the table of shardings says, experts are dealt out over ep, and what
is left is cut into equal rows over dp_shard x cp by FSDP2 (experts: over the ranks that have the
same ones), whose last ranks have fewer rows, or none. Parameters and gradients are padded to
equal rows; what the optimizer and averages hold is not. The first rank has the most of everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kinodit.models.block import JointBlock, SingleBlock
from kinodit.models.config import MMDiTConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.experts import Experts
from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.optim import OptimConfig, optimizer_bytes
from kinodit.trainer.optim.base import group_parameters
from kinodit.trainer.parallel.expert import check_pools
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.table import Split, assign_splits, check_heads, mmdit_table

Part = tuple[str, tuple[int, ...], int]
"""Name, whole shape, and how many of its numbers a rank has."""


@dataclass(frozen=True)
class Weight:
    """A parameter: its whole shape, and in which block it is (None: the rest of the model).

    pool: the experts that it belongs to, by name; "": none
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    pool: str = ""


@dataclass(frozen=True)
class State:
    """Bytes on one rank at rest.

    gradients are those of the shards, which are there from the backward to the update
    """

    parameters: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.averages


@dataclass(frozen=True)
class Units:
    """Numbers (not bytes) of the units that FSDP2 gathers, after the split over tp.

    blocks:     of each block, in order, as all ranks' equal shards with their padding
    rest:       of everything else, which is one unit, likewise
    whole:      of all units without padding
    replicated: of the first rank's shards, those that every tp rank has, too
    stored:     block (None: the rest) -> sizes of its matrices that are split over tp at rest and
                put together for use
    experts:    where ep ranks have experts between them, of each pool in each block what one of
                those ranks has, with padding; not among `blocks` then
    """

    blocks: tuple[int, ...]
    rest: int
    whole: int
    replicated: int
    stored: Mapping[int | None, tuple[int, ...]]
    experts: tuple[tuple[int, ...], ...] = ()

    @property
    def total(self) -> int:
        """All of them, padded."""
        return sum(self.blocks) + self.rest + sum(map(sum, self.experts))

    @property
    def largest(self) -> int:
        """Of the blocks with their experts."""
        pools = self.experts or ((),) * len(self.blocks)
        return max(block + sum(pool) for block, pool in zip(self.blocks, pools, strict=True))

    def shard(self, num_ranks: int, ep: int) -> float:
        """Numbers of each of `num_ranks` equal shards, with its share of experts."""
        experts = sum(map(sum, self.experts))
        return (self.total - experts) / num_ranks + experts / (num_ranks // ep)


class Weights:
    """The parameters of a model that is never given memory; the optimizer is AdamW if not said."""

    def __init__(self, config: MMDiTConfig, optim: OptimConfig | None = None) -> None:
        self.config, self._optim = config, optim or OptimConfig()
        with torch.device("meta"):
            self._model = MMDiT(config)
        self.weights = list(_weights(self._model))
        self._buffered = sum(buffer.numel() for buffer in self._model.buffers())
        self._local: dict[int, list[tuple[int, ...]]] = {}
        self._splits: dict[int, dict[str, Split]] = {}
        self._units: dict[tuple[int, int, int], Units] = {}
        self._cuts: dict[tuple[int, int, int, int], tuple[int, list[Part]]] = {}

    @property
    def num_experts(self) -> list[int]:
        """Of each pool of experts."""
        return [layer.config.num_experts for layer in moe_layers(self._model).values()]

    @property
    def num_buffered(self) -> int:
        """Numbers of buffers, which averages have as well."""
        return self._buffered

    def optimizer_groups(self) -> list[list[str]]:
        """Names of the parameters of each group of the optimizer."""
        groups = group_parameters(self._optim, self._model.named_parameters())
        return [list(group.parameters) for group in groups]

    def check_pools(self, ep: int) -> None:
        """See `trainer/parallel/expert.py: check_pools`."""
        check_pools(self._model, ep)

    def local_shapes(self, tp: int) -> list[tuple[int, ...]]:
        """The shape of each parameter on a tp rank, in the order of `weights`.

        Raises:
            ConfigError: tp does not divide what it has to split.
        """
        if tp not in self._local:
            shapes = [weight.shape for weight in self.weights]
            if tp > 1:
                check_heads(self.config, tp, 1)
                splits = assign_splits(self._model, mmdit_table(self.config), tp)
                self._splits[tp] = splits
                dims = [splits[weight.name].dim for weight in self.weights]
                shapes = [_divided(s, dim, tp) for s, dim in zip(shapes, dims, strict=True)]
            self._local[tp] = shapes
        return self._local[tp]

    def units(self, tp: int, num_ranks: int, ep: int = 1) -> Units:
        """What FSDP2 gathers from `num_ranks` ranks, of which `ep` have experts between them."""
        key = (tp, num_ranks, ep)
        if key not in self._units:
            self._units[key] = self._count_units(tp, num_ranks, ep)
        return self._units[key]

    def _count_units(self, tp: int, num_ranks: int, ep: int) -> Units:
        blocks = [0] * (self.config.num_double_blocks + self.config.num_single_blocks)
        rest = whole = replicated = 0
        stored: dict[int | None, tuple[int, ...]] = {}
        pools: list[dict[str, int]] = [{} for _ in blocks]
        local = self.local_shapes(tp)
        splits = self._splits.get(tp, {})
        for weight, own in zip(self.weights, local, strict=True):
            shape, over = _dealt(weight, own, ep), num_ranks // _degree(weight, ep)
            shard = _rows(shape, over) * math.prod(shape[1:])
            if weight.block is None:
                rest += shard * over
            elif over < num_ranks:
                inside = pools[weight.block]
                inside[weight.pool] = inside.get(weight.pool, 0) + shard * over
            else:
                blocks[weight.block] += shard * over
            whole += math.prod(shape)
            split = splits.get(weight.name)
            if split is None:
                continue
            if split.dim is None:
                replicated += shard
            elif not split.part:
                sizes = (*stored.get(weight.block, ()), math.prod(weight.shape))
                stored[weight.block] = sizes
        experts = tuple(tuple(inside.values()) for inside in pools) if ep > 1 else ()
        return Units(tuple(blocks), rest, whole, replicated, stored, experts)

    def state(self, parallel: ParallelConfig, item: int, num_averages: int, rank: int = 0) -> State:
        """Bytes on the `rank`-th of the dp_shard x cp ranks, with numbers of `item` bytes."""
        assert parallel.dp_shard > 0, "the degrees must be resolved"
        num_ranks = parallel.dp_shard * parallel.cp
        padded, parts = self._cut(parallel.tp, num_ranks, rank, parallel.ep)
        own = sum(size for _, _, size in parts)
        return State(
            parameters=padded * item,
            gradients=padded * item,
            optimizer=optimizer_bytes(self._optim, parts, item),
            averages=num_averages * (own + self._buffered) * item,
        )

    def _cut(self, tp: int, num_ranks: int, rank: int, ep: int) -> tuple[int, list[Part]]:
        """(numbers of equal, padded shards; what is really this rank's of each parameter)."""
        key = (tp, num_ranks, rank, ep)
        if key not in self._cuts:
            padded, parts = 0, []
            for weight, own in zip(self.weights, self.local_shapes(tp), strict=True):
                # Neighbours have experts between them: the same ones are `ep` ranks apart.
                degree = _degree(weight, ep)
                shape, over, place = _dealt(weight, own, ep), num_ranks // degree, rank // degree
                row = math.prod(shape[1:])
                padded += _rows(shape, over) * row
                parts.append((weight.name, weight.shape, _own_rows(shape, over, place) * row))
            self._cuts[key] = padded, parts
        return self._cuts[key]


def _weights(model: nn.Module) -> list[Weight]:
    blocks = [
        name for name, part in model.named_modules() if isinstance(part, JointBlock | SingleBlock)
    ]
    owner = {f"{name}.": index for index, name in enumerate(blocks)}
    pools = {name for name, part in model.named_modules() if isinstance(part, Experts)}
    found = []
    for name, parameter in model.named_parameters():
        prefix = ".".join(name.split(".")[:2]) + "."
        pool = name.rpartition(".")[0]
        pool = pool if pool in pools else ""
        found.append(Weight(name, tuple(parameter.shape), owner.get(prefix), pool))
    return found


def _degree(weight: Weight, ep: int) -> int:
    """Ranks that have `weight` between them."""
    return ep if weight.pool else 1


def _dealt(weight: Weight, shape: tuple[int, ...], ep: int) -> tuple[int, ...]:
    """What is left of `shape` where `ep` ranks have experts between them."""
    return (shape[0] // _degree(weight, ep), *shape[1:])


def _divided(shape: Sequence[int], dim: int | None, degree: int) -> tuple[int, ...]:
    return tuple(size // degree if at == dim else size for at, size in enumerate(shape))


def _rows(shape: Sequence[int], num_ranks: int) -> int:
    """Rows of the largest of equal cuts along dim 0."""
    return -(-shape[0] // num_ranks)


def _own_rows(shape: Sequence[int], num_ranks: int, rank: int) -> int:
    size = _rows(shape, num_ranks)
    return max(0, min(size, shape[0] - rank * size))
