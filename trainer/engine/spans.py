"""Stretches of flattened parameters, moved from the ranks that have them to those that want them.

ZeRO gives every rank a stretch of each flattened parameter; DTensors sharded by rows are stretches
as well, since rows lie one behind the other. From one to the other it takes one exchange between
the ranks, and nobody ever holds a whole parameter for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.trainer.parallel.traffic import note, others_share

STATE = "state"
"""What the messages are for."""
MESSAGE_NUMEL = 1 << 24
"""Numbers that a rank sends in one message, about."""

Span = tuple[int, int]
"""[start, stop) of a flattened parameter."""
Spans = Mapping[str, Sequence[Span]]
"""Name -> the span of each rank of a group."""


def row_spans(shape: Sequence[int], num_ranks: int) -> list[Span]:
    """Spans of equal numbers of rows; the last ranks have fewer, or none. FSDP2's way to shard."""
    rows = -(-shape[0] // num_ranks)
    width = math.prod(shape[1:])
    cuts = [min(rank * rows, shape[0]) * width for rank in range(num_ranks + 1)]
    return list(itertools.pairwise(cuts))


def overlap(one: Span, other: Span) -> Span:
    """What both have; empty if nothing."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return start, max(start, stop)


def redistribute(
    parts: Mapping[str, Tensor],
    have: Spans,
    wanted: Mapping[str, Tensor],
    want: Spans,
    group: ProcessGroup | None,
) -> None:
    """Fill `wanted` from `parts`, flat tensors of this rank's spans, by name. Collective.

    have, want: each rank's spans; group: the ranks, None for one
    """
    if group is None:
        for name, out in wanted.items():
            out.copy_(parts[name])
        return
    own = dist.get_rank(group)
    for names in _batches(have):
        _exchange(names, own, parts, have, wanted, want, group)


def _exchange(
    names: Sequence[str],
    own: int,
    parts: Mapping[str, Tensor],
    have: Spans,
    wanted: Mapping[str, Tensor],
    want: Spans,
    group: ProcessGroup,
) -> None:
    num_ranks = dist.get_world_size(group)
    like = parts[names[0]]
    sent = [
        [_piece(parts[name], have[name][own], want[name][rank]) for name in names]
        for rank in range(num_ranks)
    ]
    received = [
        [_piece(wanted[name], want[name][own], have[name][rank]) for name in names]
        for rank in range(num_ranks)
    ]
    counts_out = [sum(piece.numel() for piece in pieces) for pieces in sent]
    counts_in = [sum(piece.numel() for piece in pieces) for pieces in received]
    message = torch.cat([piece.to(like.device) for pieces in sent for piece in pieces])
    answer = torch.empty(sum(counts_in), dtype=message.dtype, device=_talking(group, like))
    message = message.to(answer.device)
    note(STATE, "all_to_all", others_share(message, num_ranks))
    dist.all_to_all_single(answer, message, counts_in, counts_out, group=group)
    flat = [piece for pieces in received for piece in pieces]
    for piece, values in zip(flat, answer.split([p.numel() for p in flat]), strict=True):
        piece.copy_(values)


def _talking(group: ProcessGroup, like: Tensor) -> torch.device:
    """The device whose memory the group sends from; what is offloaded has to go there first."""
    if like.device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return like.device


def _piece(values: Tensor, span: Span, other: Span) -> Tensor:
    """The part of `values`, which are those of `span`, that lies in `other`."""
    start, stop = overlap(span, other)
    return values[start - span[0] : stop - span[0]] if stop > start else values[:0]


def _batches(have: Spans) -> Iterator[list[str]]:
    """Names whose messages are not too large together; the same on every rank."""
    batch: list[str] = []
    size = 0
    for name, spans in have.items():
        largest = max(stop - start for start, stop in spans)
        if batch and size + largest > MESSAGE_NUMEL:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += largest
    if batch:
        yield batch
