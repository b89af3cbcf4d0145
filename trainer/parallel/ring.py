"""Attention to the keys and values of all ranks of a ring, in turn, with its own backward.

Every rank keeps its queries. In turn i it meets the keys and values of the rank i places before it,
while those of the next turn are on their way. They come from their owner, not from the neighbour,
so that none pass through a rank that has no query for them. Partial outputs are merged by their
log-sum-exp; the backward runs each partial attention again with the output and log-sum-exp of the
whole, which makes its gradients exact (Liu et al., arXiv 2310.01889, section 3).

Shape legend: m queries here (segment-major), m_r keys that rank r sends here, H query heads, K
key/value heads, D head dim, G groups of the layout, R ranks of the ring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.trainer.parallel.collectives import Transfer
from kinodit.trainer.parallel.pairs import Pieces, Rows, keys_sent
from kinodit.trainer.parallel.sequence import CutLayout

RING = "ring"
"""What its messages are for."""


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: CutLayout, hop: int, group: ProcessGroup
) -> Tensor:
    """q [m, H, D], k and v [m, K, D], each in segment-major order -> [m, H, D].

    `hop` is this rank's place in the ring, which is `group`.
    """
    out: Tensor = _Ring.apply(q, k, v, layout, hop, group)  # type: ignore[no-untyped-call]
    return out


class Flash(NamedTuple):
    """Flash attention of a device that tells its log-sum-exp.

    forward:  (q, k, v [1, H, L, D]) -> out [1, H, L, D], log-sum-exp [1, H, L]
    backward: (grad of out, q, k, v, out, log-sum-exp) -> gradients of q, k, v
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad_q, grad_k, grad_v = backward(grad, q, k, v, out, lse, 0.0, False)
    return grad_q, grad_k, grad_v


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the state of the random generator is not looked at.
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, unused, unused
    )
    return grad_q, grad_k, grad_v


FLASH: dict[str, Flash] = {
    "cpu": Flash(_cpu_forward, _cpu_backward),
    "cuda": Flash(_cuda_forward, _cuda_backward),
}
"""Device type -> its flash attention. On CUDA for what `fits_flash` only."""


Runs = tuple[tuple[int, int], ...]
"""(first row, number of rows) of each."""


class Pair(NamedTuple):
    """Neighbouring queries here, and the keys of one rank that all of them attend to.

    first, num_rows: the rows of the queries
    keys:            (first row, number of rows) of each run of keys
    """

    first: int
    num_rows: int
    keys: Runs

    def rows(self, x: Tensor) -> Tensor:
        """The queries' rows of `x`, sharing its memory."""
        return x.narrow(0, self.first, self.num_rows)

    def pick(self, x: Tensor) -> Tensor:
        """The visible rows of keys or values."""
        runs = [x.narrow(0, first, count) for first, count in self.keys]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add `part`, in the order of `pick`, to the rows of `total` that it belongs to."""
        sizes = [count for _, count in self.keys]
        for (first, count), piece in zip(self.keys, part.split(sizes), strict=True):
            total.narrow(0, first, count).add_(piece)


def pairs(layout: CutLayout, here: int, there: int) -> list[Pair]:
    """What queries of hop `here` have to meet of the keys that hop `there` sends them.

    Neighbouring groups that see the same keys share one call.
    """
    return _pairs(layout.pieces, layout.visible, here, there)


# Every block of a pass asks again, for a table that has a row for each frame of a pack.
@lru_cache(maxsize=256)
def _pairs(pieces: Pieces, visible: Rows, here: int, there: int) -> list[Pair]:
    sizes = keys_sent(pieces, visible, here, there)
    starts_q, starts_k = _starts(pieces[here]), _starts(sizes)
    found: list[Pair] = []
    for group, row in enumerate(visible):
        count = pieces[here][group]
        runs = _joined((starts_k[key], sizes[key]) for key in row)
        if not count or not runs:
            continue
        pair = Pair(starts_q[group], count, runs)
        last = found[-1] if found else None
        if last and last.keys == pair.keys and last.first + last.num_rows == pair.first:
            found[-1] = last._replace(num_rows=last.num_rows + count)
        else:
            found.append(pair)
    return found


@lru_cache(maxsize=256)
def _runs(pieces: Pieces, visible: Rows, here: int, there: int) -> Runs:
    """Rows of what hop `there` sends to hop `here`, among the keys that it has."""
    sizes = keys_sent(pieces, visible, here, there)
    return _joined(zip(_starts(pieces[there]), sizes, strict=False))


def _joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """(first row, number of rows), with neighbouring runs as one and without empty ones."""
    found: list[tuple[int, int]] = []
    for first, count in runs:
        if count and found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + count)
        elif count:
            found.append((first, count))
    return tuple(found)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: CutLayout, hop: int, group: ProcessGroup
    ) -> Tensor:
        flash = FLASH[q.device.type]
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=wide)
        lse_mH = q.new_full(q.shape[:2], -math.inf, dtype=wide)
        for there, kv in _passing(torch.stack((k, v)), layout, hop, group):
            for pair in pairs(layout, hop, there):
                _attend(flash, pair, q, kv, out, lse_mH)
            del kv  # before those after the next are given room
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse_mH)
        ctx.layout, ctx.hop, ctx.group = layout, hop, group
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_mH = ctx.saved_tensors
        layout, hop, group = ctx.layout, ctx.hop, ctx.group
        flash = FLASH[q.device.type]
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = q.new_zeros(q.shape, dtype=wide)
        own = k.new_zeros(2, *k.shape, dtype=wide)
        returning = _Returning(own, layout, hop, group)
        for there, kv in _passing(torch.stack((k, v)), layout, hop, group):
            made = own if there == hop else kv.new_zeros(kv.shape, dtype=wide)
            for pair in pairs(layout, hop, there):
                _attend_backward(flash, pair, grad, q, kv, out, lse_mH, grad_q, made)
            del kv
            returning.send(there, made)
            del made
        returning.add()
        grad_k, grad_v = own.to(k.dtype).unbind()
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


def _attend(flash: Flash, pair: Pair, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the attention of one pair into `out` and `lse`, and free what it took."""
    part, part_lse = flash.forward(*_call_shapes(pair, q, kv))
    part, part_lse = part.squeeze(0).transpose(0, 1), part_lse.squeeze(0).t()
    _merge(pair.rows(out), pair.rows(lse), part, part_lse)


def _attend_backward(
    flash: Flash,
    pair: Pair,
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
) -> None:
    """Add the gradients of one pair to `grad_q` [m, H, D] and `grad_kv` [2, m_r, K, D]."""
    grad_i, out_i = (pair.rows(x).transpose(0, 1).unsqueeze(0) for x in (grad, out))
    lse_i = pair.rows(lse).t().unsqueeze(0)
    of_q, *of_kv = flash.backward(grad_i, *_call_shapes(pair, q, kv), out_i, lse_i)
    pair.rows(grad_q).add_(of_q.squeeze(0).transpose(0, 1))
    for total, part in zip(grad_kv.unbind(), of_kv, strict=True):
        by_query_head = part.squeeze(0).transpose(0, 1).unflatten(1, (kv.shape[2], -1))
        pair.add(total, by_query_head.sum(2, dtype=total.dtype))


def _passing(
    own: Tensor, layout: CutLayout, hop: int, group: ProcessGroup
) -> Iterator[tuple[int, Tensor]]:
    """(whose they are, keys and values [2, m_r, K, D]) in turn, the `own` [2, m, K, D] first."""
    num_hops, kv = len(layout.pieces), own
    for turn in range(num_hops):
        following = None
        if turn + 1 < num_hops:
            to, source = (hop + turn + 1) % num_hops, (hop - turn - 1) % num_hops
            sent = _pick(own, _runs(layout.pieces, layout.visible, to, hop))
            num_rows = sum(keys_sent(layout.pieces, layout.visible, hop, source))
            shape = (2, num_rows, *own.shape[2:])
            following = Transfer(sent, to, shape, source, group, RING)
            del sent
        yield (hop - turn) % num_hops, kv
        if following is not None:
            kv = following.wait()


def _pick(own: Tensor, runs: Runs) -> Tensor:
    """Runs of rows of [2, m, K, D]; of all of them `own` itself."""
    if runs == ((0, own.shape[1]),):
        return own
    return torch.cat([own.narrow(1, *run) for run in runs] or [own.narrow(1, 0, 0)], dim=1)


class _Returning:
    """Gradients on their way to the owners of the keys, one turn behind the computation.

    own: [2, m, K, D], the gradients of this rank's keys and values, to which what comes is added
    """

    def __init__(self, own: Tensor, layout: CutLayout, hop: int, group: ProcessGroup) -> None:
        self._own, self._layout, self._hop, self._group = own, layout, hop, group
        self._coming: tuple[Runs, Transfer] | None = None

    def send(self, there: int, made: Tensor) -> None:
        """Send what was `made` for the keys of `there`, once the turn before has come."""
        if there == self._hop:
            return
        self.add()
        # Whoever has this rank's keys in this turn is as far ahead as their owner is behind.
        pieces, visible = self._layout.pieces, self._layout.visible
        source = (2 * self._hop - there) % len(pieces)
        runs = _runs(pieces, visible, source, self._hop)
        shape = (2, sum(count for _, count in runs), *made.shape[2:])
        self._coming = runs, Transfer(made, there, shape, source, self._group, RING)

    def add(self) -> None:
        """Wait for what is on its way, and add it."""
        if self._coming is None:
            return
        runs, transfer = self._coming
        parts = transfer.wait().split([count for _, count in runs], dim=1)
        for run, part in zip(runs, parts, strict=True):
            self._own.narrow(1, *run).add_(part)
        self._coming = None


def _call_shapes(pair: Pair, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A pair's rows as [1, H, L, D] each: key/value heads repeated for their queries."""
    k, v = (pair.pick(x) for x in kv.unbind())
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (pair.rows(q), k, v))
    return q, k, v


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a partial softmax attention [m, H, D] with log-sum-exp [m, H] to the one so far."""
    part_lse = part_lse.to(lse.dtype)
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.addcmul_(part.to(out.dtype), (part_lse - total).exp_().unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)
