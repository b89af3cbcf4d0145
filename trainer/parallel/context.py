"""Attention whose tokens lie on several ranks: Ulysses, ring, and both at once.

Ulysses (Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509) turns all heads of some tokens into
some heads of all tokens by one all-to-all for q, k and v together, and back by another. In a ring
(Liu et al., arXiv 2310.01889) keys and values travel past the queries instead, and partial results
are merged by their log-sum-exp. The 2-D form runs a ring between groups of Ulysses ranks
(Fang and Zhao, "USP", arXiv 2405.07719).

Shape legend: n tokens held here, m tokens held by the ulysses group, H query heads, K key/value
heads, u ranks of the ulysses group, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.models.attention import AttentionOp, attend_segment_major, permute
from kinodit.models.tokens import AttentionLayout
from kinodit.trainer.parallel.collectives import all_to_all
from kinodit.trainer.parallel.ring import ring_attention
from kinodit.trainer.parallel.sequence import CutLayout, Place

ULYSSES = "ulysses"
"""What the messages of heads are for."""


@dataclass(frozen=True)
class ContextAttention:
    """An attention op for batches that `cut` dealt out.

    heads:  process group that exchanges heads, in the order of the ranks' indices
    ring:   process group of ranks with the same heads, in the order of their hops
    within: attention of tokens in segment-major order, where there is no ring
    """

    place: Place
    heads: ProcessGroup | None
    ring: ProcessGroup | None
    within: AttentionOp = attend_segment_major

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        """q [n, H, D], k and v [n, K, D] of this rank's tokens -> [n, H, D]."""
        assert isinstance(layout, CutLayout), "a batch that was not dealt out to the ranks"
        if sum(layout.lengths) == 0:
            # A filler pack: the graph must reach all three, and nobody communicates.
            return q + k.sum() + v.sum()
        if self.heads is None:
            return self._in_order(q, k, v, layout)
        k, v = (_enough_heads(x, self.place.ulysses) for x in (k, v))
        q, k, v = gather_tokens((q, k, v), layout, self.place, self.heads)
        return scatter_tokens(self._in_order(q, k, v, layout), layout, self.place, self.heads)

    def _in_order(self, q: Tensor, k: Tensor, v: Tensor, layout: CutLayout) -> Tensor:
        """Attention of the ulysses group's tokens to all of the pack's: [m, H / u, D]."""
        there = cast(Tensor, layout.order), cast(Tensor, layout.inverse)
        q, k, v = (permute(x, *there) for x in (q, k, v))
        if self.ring is None:
            out = self.within(q, k, v, layout)
        else:
            out = ring_attention(q, k, v, layout, self.place.hop, self.ring)
        return permute(out, there[1], there[0])


def gather_tokens(
    parts: tuple[Tensor, Tensor, Tensor], layout: CutLayout, place: Place, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [n, heads, D] -> [m, heads / u, D]: one message to each rank carries all three."""
    num_heads = [x.shape[1] // place.ulysses for x in parts]
    cut_heads = [x.unflatten(1, (place.ulysses, -1)) for x in parts]
    send = torch.cat(cut_heads, dim=2).transpose(0, 1).flatten(0, 1)
    num_mine = parts[0].shape[0]
    received = all_to_all(send, [num_mine] * place.ulysses, layout.num_held, group, ULYSSES)
    q, k, v = received.split(num_heads, dim=1)
    return q, k, v


def scatter_tokens(out: Tensor, layout: CutLayout, place: Place, group: ProcessGroup) -> Tensor:
    """[m, H / u, D] -> [n, H, D]: every token's heads come home."""
    num_mine = layout.num_held[place.index % place.ulysses]
    received = all_to_all(out, layout.num_held, [num_mine] * place.ulysses, group, ULYSSES)
    by_rank: Tensor = received.unflatten(0, (place.ulysses, num_mine))
    return by_rank.transpose(0, 1).flatten(1, 2)


def _enough_heads(x: Tensor, ulysses: int) -> Tensor:
    """Key or value heads repeated, so that each rank gets those of its query heads."""
    if x.shape[1] % ulysses == 0:
        return x
    return x.repeat_interleave(ulysses // x.shape[1], dim=1)
