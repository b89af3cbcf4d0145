"""Counting what crosses between ranks, by what it is for.

Collectives of our own report themselves under a label; those of FSDP2 are counted where it calls
them. Bytes are those that this rank has to receive, whatever the algorithm: of an all-gather what
the others have, (n - 1) / n of the whole; of a reduce-scatter as much; of an all-reduce both; of an
all-to-all and of a transfer what comes from others.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

_WATCHING: list[Traffic] = []


@dataclass
class Traffic:
    """Messages and bytes by (label, kind) while it is entered. Labels of FSDP2: fsdp and hsdp."""

    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __enter__(self) -> Traffic:
        self._stack = ExitStack()
        self._stack.enter_context(patch.object(_fsdp_collectives, "dist", _Counted()))
        _WATCHING.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _WATCHING.remove(self)
        self._stack.close()

    def total(self, label: str) -> tuple[int, int]:
        """(messages, bytes) of a label, of any kind."""
        keys = [key for key in self.messages if key[0] == label]
        return sum(self.messages[key] for key in keys), sum(self.num_bytes[key] for key in keys)


def note(label: str, kind: str, num_bytes: int) -> None:
    """Report one message to whoever counts."""
    for traffic in _WATCHING:
        traffic.messages[label, kind] += 1
        traffic.num_bytes[label, kind] += num_bytes


def others_share(whole: Tensor, num_ranks: int) -> int:
    """Bytes of `whole` that equal parts on the other ranks of a group make up."""
    return whole.nbytes // num_ranks * (num_ranks - 1)


class _Counted:
    """torch.distributed as FSDP2 sees it, with its collectives counted."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather_single(self, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = dist.get_world_size(kwargs["group"])
        if size > 1:
            note("fsdp", "all_gather", others_share(output_tensor, size))
        return dist.all_gather_single(output_tensor, *args, **kwargs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        size = dist.get_world_size(kwargs["group"])
        if size > 1:
            note("fsdp", "reduce_scatter", others_share(input, size))
        return dist.reduce_scatter_single(output=output, input=input, **kwargs)

    def all_reduce(self, tensor: Tensor, **kwargs: Any) -> Any:
        size = dist.get_world_size(kwargs["group"])
        if size > 1:
            note("hsdp", "all_reduce", 2 * others_share(tensor, size))
        return dist.all_reduce(tensor, **kwargs)
