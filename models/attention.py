"""Attention over a packed joint sequence: the one injectable op of the model.

Shape legend: J tokens of the joint sequence (stream-major), H query heads, H_kv key/value heads,
D head dim, B segments of equal length, L their length.

The model calls `attend(q, k, v, layout)` and nothing else. A parallel layout (Ulysses, ring) is
another callable of the same signature; a device brings its kernel by a row of `KERNELS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinodit.models.tokens import AttentionLayout

AttentionOp = Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]


@dataclass(frozen=True)
class Visibility:
    """A layout's table after adjacent groups that nothing tells apart were merged.

    lengths: token counts of the merged groups, in segment-major order
    visible: for each merged group the merged groups that its queries attend to
    """

    lengths: tuple[int, ...]
    visible: tuple[tuple[int, ...], ...]

    @property
    def is_block_diagonal(self) -> bool:
        """Whether every merged group sees itself and nothing else: plain packed attention."""
        return all(row == (index,) for index, row in enumerate(self.visible))


@lru_cache(maxsize=64)
def merge_groups(lengths: tuple[int, ...], visible: tuple[tuple[int, ...], ...]) -> Visibility:
    """Merge adjacent groups with equal rows and equal columns of the visibility table.

    With full visibility each segment becomes one group. Groups of different segments never have
    equal rows, as a group sees groups of its own segment only (a group that sees nothing and is
    seen by nothing may merge with its like, which changes nothing).
    """
    seen_by: list[list[int]] = [[] for _ in lengths]
    for query, row in enumerate(visible):
        for key in row:
            seen_by[key].append(query)
    merged_index: list[int] = []
    merged_lengths: list[int] = []
    first: list[int] = []
    for index, length in enumerate(lengths):
        is_same = (
            index > 0
            and visible[index] == visible[index - 1]
            and seen_by[index] == seen_by[index - 1]
        )
        if is_same:
            merged_lengths[-1] += length
        else:
            first.append(index)
            merged_lengths.append(length)
        merged_index.append(len(merged_lengths) - 1)
    return Visibility(
        lengths=tuple(merged_lengths),
        visible=tuple(
            tuple(dict.fromkeys(merged_index[key] for key in visible[index])) for index in first
        ),
    )


def attend_segment_major(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """`attend` for q [J, H, D], k and v [J, H_kv, D] that already are in segment-major order."""
    visibility = merge_groups(layout.lengths, layout.visible)
    kernel = KERNELS.get((q.device.type, visibility.is_block_diagonal), by_group)
    return kernel(q, k, v, visibility)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    within: AttentionOp = attend_segment_major,
) -> Tensor:
    """Softmax attention within segments, as the layout's visibility table allows.

    q is [J, H, D], k and v are [J, H_kv, D] with H a multiple of H_kv, all in the joint
    (stream-major) order. Returns [J, H, D] in the same order. A query that sees no key gets 0.
    `within` does the same for tokens in segment-major order.
    """
    if q.shape[0] == 0:
        # A filler pack: the graph must reach k and v too, or their gradients would be missing.
        return q + k.sum() + v.sum()
    if layout.order is not None and layout.inverse is not None:
        there, back = (layout.order, layout.inverse), (layout.inverse, layout.order)
        q, k, v = (permute(x, *there) for x in (q, k, v))
        return permute(within(q, k, v, layout), *back)
    return within(q, k, v, layout)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`x` [J, ...] with its rows in another order, one pass forward and one backward."""
    out: Tensor = _Permute.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Permute(torch.autograd.Function):
    """x[order]; its backward looks rows up too, where autograd's would add them to zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def by_group(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """One SDPA call per group of queries over the keys it sees; shapes as `attend`: [J, H, D]."""
    if not any(visibility.visible):
        # Nobody sees anything: zeros, but the graph must still reach all three.
        return 0 * (q + k.sum() + v.sum())
    lengths = list(visibility.lengths)
    # split, not slices: the backward of a slice is a full-size tensor of zeros per slice.
    q_parts, k_parts, v_parts = q.split(lengths), k.split(lengths), v.split(lengths)
    outputs = []
    for index, row in enumerate(visibility.visible):
        if not row:
            outputs.append(torch.zeros_like(q_parts[index]))
            continue
        keys = k_parts[row[0]] if len(row) == 1 else torch.cat([k_parts[key] for key in row])
        values = v_parts[row[0]] if len(row) == 1 else torch.cat([v_parts[key] for key in row])
        outputs.append(_sdpa(q_parts[index], keys, values, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def by_segment(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """One SDPA call per run of segments of equal length; shapes as `attend`: [J, H, D].

    Every token sees its whole segment.
    """
    runs = equal_runs(visibility.lengths)
    if len(runs) == 1:
        return _sdpa(q, k, v, runs[0][0])
    sizes = [count * length for count, length in runs]
    parts = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_sdpa(q_i, k_i, v_i, count) for (count, _), q_i, k_i, v_i in parts])


def equal_runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive equal lengths as (count, length): (4, 4, 2) -> [(2, 4), (1, 2)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs


def _sdpa(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """SDPA of `count` equally long segments lying one after the other: [B*L, H, D] each."""
    q_BHLD, k_BHLD, v_BHLD = (
        x.view(count, -1, x.shape[-2], x.shape[-1]).transpose(1, 2) for x in (q, k, v)
    )
    out_BHLD = F.scaled_dot_product_attention(
        q_BHLD, k_BHLD, v_BHLD, enable_gqa=q.shape[-2] != k.shape[-2]
    )
    return out_BHLD.transpose(1, 2).reshape(q.shape)


def attend_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query [m, H, D] to all keys and values [n, K, D], which may be fewer or more: as q."""
    return _sdpa(q, k, v, 1)


def varlen_cuda(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """One varlen flash call for all segments; shapes as `attend`.

    What the kernel does not take goes segment by segment.
    """
    if not fits_flash(q.dtype, q.shape[-1]):
        return by_segment(q, k, v, visibility)
    from torch.nn.attention.varlen import varlen_attn

    ends = segment_ends(visibility.lengths, q.device)
    longest = max(visibility.lengths)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, enable_gqa=q.shape[-2] != k.shape[-2])
    assert isinstance(out, Tensor)
    return out


def fits_flash(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether CUDA's flash kernels take it: 16-bit formats, head dims in steps of 8 up to 256."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def segment_ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[B + 1] int32 on `device`: 0 and the running sums of `lengths`, copied without a sync."""
    ends = (0, *itertools.accumulate(lengths))
    if not torch.cuda.is_available():  # a pretended device, which has no pinned memory
        return torch.tensor(ends, dtype=torch.int32, device=device)
    pinned = torch.tensor(ends, dtype=torch.int32, pin_memory=True)
    return pinned.to(device, non_blocking=True)


def attend_within(q: Tensor, k: Tensor, v: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Attention among the tokens of one stream, each segment by itself: [N, H, D] -> [N, H, D].

    `segment` [N] is non-decreasing. A layout has no lengths of a single stream, so they are counted
    here: on the host for a CPU, on the device otherwise, never with a sync.
    """
    if q.shape[0] == 0:
        return q + k.sum() + v.sum()
    if q.device.type == "cpu":
        counts = torch.bincount(segment, minlength=num_segments).tolist()
        lengths = tuple(count for count in counts if count)
        alone = tuple((index,) for index in range(len(lengths)))
        return by_segment(q, k, v, Visibility(lengths, alone))
    if q.device.type == "cuda" and fits_flash(q.dtype, q.shape[-1]):
        from torch.nn.attention.varlen import varlen_attn

        rows = torch.arange(num_segments + 1, device=segment.device)
        ends = torch.searchsorted(segment, rows).to(torch.int32)
        out = varlen_attn(q, k, v, ends, ends, q.shape[0], q.shape[0])
        assert isinstance(out, Tensor)
        return out
    mask = segment.unsqueeze(1) == segment.unsqueeze(0)
    q_HND, k_HND, v_HND = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_HND, k_HND, v_HND, attn_mask=mask).transpose(0, 1)


Kernel = Callable[[Tensor, Tensor, Tensor, Visibility], Tensor]

KERNELS: dict[tuple[str, bool], Kernel] = {
    ("cpu", True): by_segment,
    ("cuda", True): varlen_cuda,
}
"""(device type, is block diagonal) -> kernel; what is not listed goes group by group."""
