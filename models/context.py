"""What the blocks of one forward pass see besides the tokens, and their calls out of graphs.

Shape legend: N tokens of one stream, M of its tokens that matrices see (N in one process), J tokens
of all streams (stream-major), d width, H heads, D head dim, P = D / 2, K rows of the noise-level
table, c width of the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kinodit.models.attention import AttentionOp
from kinodit.models.config import SINGLE
from kinodit.models.exchange import Exchange, Parts
from kinodit.models.modulation import Modulation, Rows
from kinodit.models.moe.experts import ExpertOp, apply_experts
from kinodit.models.moe.layer import MoE, Surroundings
from kinodit.models.moe.router import Seen, all_seen
from kinodit.models.tokens import AttentionLayout

Rotary = Tensor | None

ALL = SINGLE
"""The name of the one stream that single blocks see."""


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass sees besides the tokens.

    Not a pytree on purpose: a wrapper that casts the floating inputs of a block to bf16 must not
    reach the rotary tables.

    condition: [K, c], activated
    shared:    stream -> [K, parts * d], rows of the modulation that all blocks share; may be empty
    level:     stream -> [N] int64, each token's row of `condition`
    num_seen:  stream -> number of tokens M that its projections see; N in one process
    rotary:    stream -> cosines and sines [M, P, 2], or None for a stream that is not rotated
    layout:    who attends to whom
    attend:    the attention op
    exchange:  what happens where processes share tokens and matrices; None in one process
    level_t:   [K] noise level of each row of `condition`
    level_segment: [K] the sample of each row, of `num_segments` in the pack
    levels_seen: stream -> [M] int64, the row of each token that its matrices see
    time:      [K, c] activated embedding of each row's noise level, if a router asks for it
    tasks:     [G, c] the same of noise levels that tell routers apart, if one asks, in training
    draws:     [S] what draws for each sample are keyed by; None: nothing is drawn
    stream:    [M] int64, the stream of each token that single blocks see; None before them
    apply_experts: applies experts to rows
    """

    condition: Tensor
    shared: Mapping[str, Tensor]
    level: Mapping[str, Tensor]
    num_seen: Mapping[str, int]
    rotary: Mapping[str, Rotary]
    layout: AttentionLayout
    attend: AttentionOp
    exchange: Exchange | None
    level_t: Tensor
    level_segment: Tensor
    num_segments: int
    levels_seen: Mapping[str, Tensor]
    time: Tensor | None = None
    tasks: Tensor | None = None
    draws: Tensor | None = None
    stream: Tensor | None = None
    apply_experts: ExpertOp = apply_experts

    def merged(self) -> Context:
        """The same for all streams' tokens seen as one stream, as single blocks do."""
        seen = list(self.num_seen.values())
        return replace(
            self,
            levels_seen={ALL: torch.cat(list(self.levels_seen.values()))},
            stream=torch.cat(
                [self.level_t.new_full((n,), i, dtype=torch.int64) for i, n in enumerate(seen)]
            ),
            level={ALL: torch.cat(list(self.level.values()))},
            num_seen={ALL: sum(self.num_seen.values())},
            rotary={ALL: merged_table(self.rotary, self.num_seen)},
        )

    def gather(self, parts: Parts) -> Parts:
        """Own tokens [N, d] of every stream -> the tokens that its matrices see [M, d]."""
        return parts if self.exchange is None else call_gather(self.exchange, parts, self.layout)

    def scatter(self, parts: Parts) -> Parts:
        """Results [M, d] of matrices that may be parts of whole ones -> of own tokens [N, d]."""
        return parts if self.exchange is None else call_scatter(self.exchange, parts, self.layout)

    def feed_forward(self, mlp: nn.Module, name: str, x: Tensor) -> Tensor:
        """`x` [M, d] of stream `name` through its feed-forward, or through its experts."""
        out: Tensor = call_experts(mlp, name, x, self) if isinstance(mlp, MoE) else mlp(x)
        return out

    def rows(self, modulations: Mapping[str, Modulation]) -> dict[str, list[Rows]]:
        """What the condition does to every branch of every stream."""
        made: Parts = {name: m.project(self.condition) for name, m in modulations.items()}
        made = made if self.exchange is None else call_join(self.exchange, made)
        return {name: m.rows(made[name], self.shared.get(name)) for name, m in modulations.items()}


def merged_table(rotary: Mapping[str, Rotary], num_seen: Mapping[str, int]) -> Rotary:
    """The tables [M, P, 2] of all streams as one [J, P, 2]; a stream without one is turned by 0."""
    known = [table for table in rotary.values() if table is not None]
    if not known:
        return None
    like = known[0]
    pairs = (1, like.shape[1])
    unturned = torch.stack((like.new_ones(pairs), like.new_zeros(pairs)), dim=-1)
    tables = []
    for name, table in rotary.items():
        tables.append(unturned.expand(num_seen[name], -1, -1) if table is None else table)
    return torch.cat(tables)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_attention(
    attend: AttentionOp, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout
) -> Tensor:
    """`attend`, kept out of compiled graphs: a layout is different in every batch.

    q [J, H, D], k and v [J, H_kv, D] -> [J, H, D].
    """
    return attend(q, k, v, layout)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_gather(exchange: Exchange, parts: Parts, layout: AttentionLayout) -> Parts:
    """`exchange.gather`, kept out of compiled graphs, as are the others: counts differ by batch."""
    return exchange.gather(parts, layout)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_scatter(exchange: Exchange, parts: Parts, layout: AttentionLayout) -> Parts:
    """`exchange.scatter`, kept out of compiled graphs."""
    return exchange.scatter(parts, layout)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_join(exchange: Exchange, parts: Parts) -> Parts:
    """`exchange.join`, kept out of compiled graphs."""
    return exchange.join(parts)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_experts(layer: MoE, name: str, x: Tensor, context: Context) -> Tensor:
    """A layer of experts on stream `name`, `x` [n, d] -> [n, d].

    Kept out of compiled graphs: each has other counts in every batch.
    """
    exchange = context.exchange

    def own(seen: Tensor) -> Tensor:
        return seen if exchange is None else exchange.own(name, seen, context.layout)

    def gather(seen: Tensor) -> tuple[Tensor, Tensor]:
        if exchange is None:
            return all_seen(seen)
        return exchange.gather_pack(name, seen, context.layout)

    level = context.levels_seen[name]
    seen = Seen(
        context.level_t.index_select(0, level),
        context.stream,
        level,
        context.time,
        context.level_segment.index_select(0, level),
        context.draws,
        context.tasks,
        context.num_segments,
        gather,
    )
    levels = context.level_t.index_select(0, context.level[name])
    is_whole = context.apply_experts is apply_experts
    out: Tensor = layer(x, Surroundings(seen, levels, own, context.apply_experts, is_whole))
    return out
