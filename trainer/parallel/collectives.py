"""Collectives that autograd can go through. Activations are plain local tensors on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_to_all(
    x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: ProcessGroup
) -> Tensor:
    """Rows of `x` [sum(send_rows), ...] to the ranks of `group`, in their order.

    Returns [sum(receive_rows), ...]: what each rank sent here, by rank. The backward is the same
    exchange the other way round. Counts are known on every rank beforehand; nothing is asked for.
    """
    out: Tensor = _AllToAll.apply(x, tuple(send_rows), tuple(receive_rows), group)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_rows: tuple[int, ...],
        receive_rows: tuple[int, ...],
        group: ProcessGroup,
    ) -> Tensor:
        ctx.rows, ctx.group = (send_rows, receive_rows), group
        return _exchange(x, send_rows, receive_rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send_rows, receive_rows = ctx.rows
        return _exchange(grad, receive_rows, send_rows, ctx.group), None, None, None


def _exchange(
    x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: ProcessGroup
) -> Tensor:
    out = x.new_empty(sum(receive_rows), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(receive_rows), list(send_rows), group=group)
    return out


class Shift:
    """A transfer to the next rank of a ring and from the one before, under way in the background.

    Ranks with an even index send first, those with an odd one receive first, in every transfer:
    blocking backends cannot lock up. `wait` returns what came.
    """

    def __init__(self, x: Tensor, receive_shape: Sequence[int], group: ProcessGroup) -> None:
        index, size = dist.get_rank(group), dist.get_world_size(group)
        self._sent = x.contiguous()
        self._out = x.new_empty(receive_shape)
        ahead = dist.get_global_rank(group, (index + 1) % size)
        behind = dist.get_global_rank(group, (index - 1) % size)
        ops = []
        if self._sent.numel():
            ops.append(dist.P2POp(dist.isend, self._sent, ahead, group))
        if self._out.numel():
            ops.append(dist.P2POp(dist.irecv, self._out, behind, group))
        self._pending = dist.batch_isend_irecv(ops[::-1] if index % 2 else ops) if ops else []

    def wait(self) -> Tensor:
        """Block until both directions are done; what the rank before sent."""
        for work in self._pending:
            work.wait()
        return self._out
