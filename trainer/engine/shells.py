"""How the native engine would shard each parameter: the canonical layout, without its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from kinodit.trainer.engine.spans import Span, row_spans
from kinodit.trainer.parallel.parts import as_specified


@dataclass(frozen=True)
class Shell:
    """One parameter's layout.

    spec:      of its DTensor; None in a run of one process
    shape:     of all of it
    tp_shape:  of what tp ranks have of it
    own_shape: of this rank's rows of that
    spans:     each dp rank's span of the flattened part of a tp rank
    """

    spec: Any
    shape: tuple[int, ...]
    tp_shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    spans: tuple[Span, ...]

    def wrap(self, flat: Tensor) -> Tensor:
        """This rank's numbers in the canonical shape."""
        if self.spec is None:
            return flat.view(self.shape)
        return as_specified(flat.view(self.own_shape), self.spec)

    @property
    def on_every_tp_rank(self) -> bool:
        """Whether tp ranks have all of it."""
        return self.tp_shape == self.shape


@dataclass(frozen=True)
class Shells:
    """The layouts of a model's parameters by name. group: the dp ranks, None for one process."""

    by_name: Mapping[str, Shell]
    group: ProcessGroup | None

    @classmethod
    def of(cls, model: nn.Module, group: ProcessGroup | None) -> Self:
        """From a model that `parallelize` has laid out, on the meta device."""
        num_ranks = 1 if group is None else group.size()
        return cls({name: _shell(p, num_ranks) for name, p in model.named_parameters()}, group)

    def __iter__(self) -> Iterator[tuple[str, Shell]]:
        return iter(self.by_name.items())

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(shell.shape) for shell in self.by_name.values())

    def spans(self) -> dict[str, tuple[Span, ...]]:
        """Each dp rank's span by name."""
        return {name: shell.spans for name, shell in self}

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        """Memory for this rank's numbers of each parameter, flat, on the host, as `like`'s dtype.

        On the host: it is there beside the state that it is filled from, for a save.
        """
        return {
            name: torch.empty(math.prod(shell.own_shape), dtype=like.dtype) for name, shell in self
        }


def _shell(parameter: Tensor, num_ranks: int) -> Shell:
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Shell(None, shape, shape, shape, ((0, math.prod(shape)),))
    tp_shape = list(shape)
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        placement = parameter.placements[names.index("tp")]
        if not placement.is_replicate():
            tp_shape[cast(Shard, placement).dim] //= mesh.size(names.index("tp"))
    spans = row_spans(tp_shape, num_ranks)
    own_shape = tuple(parameter.to_local().shape)
    return Shell(parameter._spec, shape, tuple(tp_shape), own_shape, tuple(spans))
