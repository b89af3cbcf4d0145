"""Collectives that autograd can go through. Activations are plain local tensors on either side.

A label says what a message is for, to whoever counts traffic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.trainer.parallel.traffic import note, others_share


def all_to_all(
    x: Tensor,
    send_rows: Sequence[int],
    receive_rows: Sequence[int],
    group: ProcessGroup,
    label: str,
) -> Tensor:
    """Rows of `x` [sum(send_rows), ...] to the ranks of `group`, in their order.

    Returns [sum(receive_rows), ...]: what each rank sent here, by rank. The backward is the same
    exchange the other way round. Counts are known on every rank beforehand; nothing is asked for.
    """
    out: Tensor = _AllToAll.apply(x, tuple(send_rows), tuple(receive_rows), group, label)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_rows: tuple[int, ...],
        receive_rows: tuple[int, ...],
        group: ProcessGroup,
        label: str,
    ) -> Tensor:
        ctx.rows, ctx.group, ctx.label = (send_rows, receive_rows), group, label
        return _exchange(x, send_rows, receive_rows, group, label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        send_rows, receive_rows = ctx.rows
        back = _exchange(grad, receive_rows, send_rows, ctx.group, ctx.label)
        return back, None, None, None, None


def _exchange(
    x: Tensor,
    send_rows: Sequence[int],
    receive_rows: Sequence[int],
    group: ProcessGroup,
    label: str,
) -> Tensor:
    out = _landing(x, receive_rows, group, label)
    dist.all_to_all_single(out, x.contiguous(), list(receive_rows), list(send_rows), group=group)
    return out


def _landing(x: Tensor, receive_rows: Sequence[int], group: ProcessGroup, label: str) -> Tensor:
    """Memory for rows like those of `x` that are about to come."""
    out = x.new_empty(sum(receive_rows), *x.shape[1:])
    own = receive_rows[dist.get_rank(group)]
    note(label, "all_to_all", (out.shape[0] - own) * math.prod(x.shape[1:]) * x.itemsize)
    return out


class Journey:
    """The exchange of `all_to_all` with time for other work in between.

    `begin` sends, `arrive` waits. The backward is begun by what came after `arrive`, and waits at
    `begin`: what was computed in between has its backward there.
    """

    def __init__(self, group: ProcessGroup, label: str) -> None:
        self._group, self._label = group, label
        self._sent: Tensor | None = None
        self._out: Tensor | None = None
        self._work: Any = None
        self.rows: tuple[Sequence[int], Sequence[int]] = ((), ())

    def begin(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Send rows of `x`, see `all_to_all`. Returns what only `arrive` may look into."""
        out: Tensor = _Begin.apply(x, tuple(send_rows), tuple(receive_rows), self)  # type: ignore[no-untyped-call]
        return out

    def arrive(self, begun: Tensor) -> Tensor:
        """Wait for what `begin` has returned; it is what came."""
        out: Tensor = _Arrive.apply(begun, self)  # type: ignore[no-untyped-call]
        return out

    def send(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Begin an exchange that autograd does not see."""
        assert self._work is None, "one exchange at a time"
        self._sent = x.contiguous()
        self._out = _landing(x, receive_rows, self._group, self._label)
        counts = list(receive_rows), list(send_rows)
        self._work = dist.all_to_all_single(
            self._out, self._sent, *counts, group=self._group, async_op=True
        )
        return self._out

    def wait(self) -> Tensor:
        """End it: what came."""
        assert self._out is not None, "nothing was sent"
        self._work.wait()
        out, self._work, self._sent, self._out = self._out, None, None, None
        return out


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_rows: tuple[int, ...],
        receive_rows: tuple[int, ...],
        journey: Journey,
    ) -> Tensor:
        ctx.journey = journey
        ctx.set_materialize_grads(False)
        journey.rows = send_rows, receive_rows
        return journey.send(x, send_rows, receive_rows)

    @staticmethod
    def backward(ctx: Any, begun: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.journey.wait(), None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.wait()
        return begun.view_as(begun)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        send_rows, receive_rows = ctx.journey.rows
        ctx.journey.send(grad, receive_rows, send_rows)
        return grad, None


def gather_rows(
    parts: Sequence[Tensor], counts: Sequence[Sequence[int]], group: ProcessGroup, label: str
) -> list[Tensor]:
    """Every rank's rows of several tensors, in one message. `parts`: of one dtype, [n, ...] each.

    counts: for each tensor, its rows on each rank. Returns [sum(counts), ...] each: the first
    rank's rows, then the second's. The backward sums over ranks what each makes of them.
    """
    made: tuple[Tensor, ...] = _GatherRows.apply(_table(counts), group, label, *parts)  # type: ignore[no-untyped-call]
    return list(made)


def scatter_rows(
    parts: Sequence[Tensor], counts: Sequence[Sequence[int]], group: ProcessGroup, label: str
) -> list[Tensor]:
    """Sums over ranks of several tensors, each rank's rows, in one message.

    `parts`: of one dtype, [sum(counts), ...] each, whose rows are laid out as `gather_rows` returns
    them. Returns [n, ...] each. The backward is `gather_rows`.
    """
    made: tuple[Tensor, ...] = _ScatterRows.apply(_table(counts), group, label, *parts)  # type: ignore[no-untyped-call]
    return list(made)


def sum_rows(parts: Sequence[Tensor], group: ProcessGroup, label: str) -> list[Tensor]:
    """Sums over ranks of several tensors of one dtype, in one message; so is the backward."""
    made: tuple[Tensor, ...] = _SumRows.apply(group, label, *parts)  # type: ignore[no-untyped-call]
    return list(made)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, label: str, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.label = group, label
        return _summed(parts, group, label)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_summed(grads, ctx.group, ctx.label)


def _summed(parts: Sequence[Tensor], group: ProcessGroup, label: str) -> tuple[Tensor, ...]:
    flat = torch.cat([part.reshape(-1) for part in parts])
    if flat.numel():
        note(label, "all_reduce", 2 * others_share(flat, dist.get_world_size(group)))
        dist.all_reduce(flat, group=group)
    pieces = flat.split([part.numel() for part in parts])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


Table = tuple[tuple[int, ...], ...]


def _table(counts: Sequence[Sequence[int]]) -> Table:
    return tuple(tuple(row) for row in counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, counts: Table, group: ProcessGroup, label: str, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.group, ctx.label = counts, group, label
        return _gather(parts, counts, group, label)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_scatter(grads, ctx.counts, ctx.group, ctx.label)


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, counts: Table, group: ProcessGroup, label: str, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.group, ctx.label = counts, group, label
        return _scatter(parts, counts, group, label)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_gather(grads, ctx.counts, ctx.group, ctx.label)


def _row_sizes(parts: Sequence[Tensor]) -> list[int]:
    return [math.prod(part.shape[1:]) for part in parts]


def _slot(parts: Sequence[Tensor], counts: Table) -> int:
    """Elements that each rank has in the message: what the rank with the most of them needs."""
    sizes = _row_sizes(parts)
    by_rank: list[tuple[int, ...]] = list(zip(*counts, strict=True))
    return max(sum(n * size for n, size in zip(rows, sizes, strict=True)) for rows in by_rank)


def _gather(
    parts: Sequence[Tensor], counts: Table, group: ProcessGroup, label: str
) -> tuple[Tensor, ...]:
    slot = _slot(parts, counts)
    num_ranks = len(counts[0])
    buffer = parts[0].new_empty(num_ranks, slot)
    if slot:
        flat = torch.cat([part.reshape(-1) for part in parts])
        mine = F.pad(flat, (0, slot - flat.numel()))
        note(label, "all_gather", others_share(buffer, num_ranks))
        dist.all_gather_single(buffer.view(-1), mine, group=group)
    pieces: list[list[Tensor]] = [[] for _ in parts]
    for rank, line in enumerate(buffer.unbind()):
        start = 0
        for index, (part, size) in enumerate(zip(parts, _row_sizes(parts), strict=True)):
            num_rows = counts[index][rank]
            length = num_rows * size
            pieces[index].append(line.narrow(0, start, length).view(num_rows, *part.shape[1:]))
            start += length
    return tuple(torch.cat(piece) for piece in pieces)


def _scatter(
    parts: Sequence[Tensor], counts: Table, group: ProcessGroup, label: str
) -> tuple[Tensor, ...]:
    slot = _slot(parts, counts)
    num_ranks, rank = len(counts[0]), dist.get_rank(group)
    mine = parts[0].new_empty(slot)
    if slot:
        pieces = [part.split(list(rows)) for part, rows in zip(parts, counts, strict=True)]
        flat: list[Tensor] = []
        for there in range(num_ranks):
            flat += [piece[there].reshape(-1) for piece in pieces]
            missing = slot - sum(piece[there].numel() for piece in pieces)
            flat.append(parts[0].new_empty(missing))
        whole = torch.cat(flat)
        note(label, "reduce_scatter", others_share(whole, num_ranks))
        dist.reduce_scatter_single(mine, whole, group=group)
    made, start = [], 0
    for part, rows, size in zip(parts, counts, _row_sizes(parts), strict=True):
        length = rows[rank] * size
        made.append(mine.narrow(0, start, length).view(rows[rank], *part.shape[1:]))
        start += length
    return tuple(made)


def gather_dim(x: Tensor, dim: int, group: ProcessGroup, label: str) -> Tensor:
    """Equal parts of a tensor along `dim`, put together; the backward hands out summed parts."""
    num_ranks = dist.get_world_size(group)
    rows = x.transpose(0, dim)
    (whole,) = gather_rows([rows], [[rows.shape[0]] * num_ranks], group, label)
    return whole.transpose(0, dim)


class Transfer:
    """Rows to one rank of a group and from another, under way in the background.

    Every rank of the group makes the same transfers in the same order. Where there are no rows,
    nothing is sent or received. `wait` returns what came.
    """

    def __init__(
        self,
        x: Tensor,
        to: int,
        receive_shape: Sequence[int],
        source: int,
        group: ProcessGroup,
        label: str,
    ) -> None:
        self._sent = x.contiguous()
        self._out = x.new_empty(receive_shape)
        ops = []
        if self._sent.numel():
            receiver = dist.get_global_rank(group, to)
            ops.append(dist.P2POp(dist.isend, self._sent, receiver, group))
        if self._out.numel():
            sender = dist.get_global_rank(group, source)
            note(label, "transfer", self._out.nbytes)
            ops.append(dist.P2POp(dist.irecv, self._out, sender, group))
        # Both ways at once, so that no rank waits to send until another has received.
        self._pending = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor:
        """Block until both directions are done; what came."""
        for work in self._pending:
            work.wait()
        return self._out
