"""Transformer blocks: joint (each stream its own weights) and single (one set for all tokens).

The joint block is Esser et al., "Scaling rectified flow transformers" (SD3, arXiv 2403.03206),
figure 2, for any number of streams; the single block with parallel attention and MLP is FLUX's,
after Dehghani et al. (ViT-22B, arXiv 2302.05442), section 2.

Shape legend: N tokens of one stream, J tokens of all streams (stream-major), d width, H heads,
D head dim, P = D / 2, K rows of the noise-level table, c width of the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from kinodit.models.attention import AttentionOp
from kinodit.models.config import MMDiTConfig
from kinodit.models.mlp import MLP
from kinodit.models.modulation import AdaNorm, Modulation, Rows, gated_add
from kinodit.models.norm import HeadNorm, RMSNorm
from kinodit.models.rope import rotate
from kinodit.models.tokens import AttentionLayout

Rotary = Tensor | None

ALL = "all"
"""The name of the one stream that single blocks see."""


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass sees besides the tokens.

    Not a pytree on purpose: a wrapper that casts the floating inputs of a block to bf16 must not
    reach the rotary tables.

    condition: [K, c], activated
    shared:    stream -> [K, parts * d], rows of the modulation that all blocks share; may be empty
    level:     stream -> [N] int64, each token's row of `condition`
    rotary:    stream -> cosines and sines [N, P, 2], or None for a stream that is not rotated
    layout:    who attends to whom
    attend:    the attention op
    """

    condition: Tensor
    shared: Mapping[str, Tensor]
    level: Mapping[str, Tensor]
    rotary: Mapping[str, Rotary]
    layout: AttentionLayout
    attend: AttentionOp

    def merged(self) -> Context:
        """The same for all streams' tokens seen as one stream, as single blocks do."""
        return replace(
            self,
            level={ALL: torch.cat(list(self.level.values()))},
            rotary={ALL: merged_table(self.rotary, self.level)},
        )


def merged_table(rotary: Mapping[str, Rotary], level: Mapping[str, Tensor]) -> Rotary:
    """The tables [N, P, 2] of all streams as one [J, P, 2]; a stream without one is turned by 0."""
    known = [table for table in rotary.values() if table is not None]
    if not known:
        return None
    like = known[0]
    pairs = (1, like.shape[1])
    unturned = torch.stack((like.new_ones(pairs), like.new_zeros(pairs)), dim=-1)
    tables = []
    for name, table in rotary.items():
        tables.append(unturned.expand(level[name].shape[0], -1, -1) if table is None else table)
    return torch.cat(tables)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_attention(
    attend: AttentionOp, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout
) -> Tensor:
    """`attend`, kept out of compiled graphs: a layout is different in every batch.

    q [J, H, D], k and v [J, H_kv, D] -> [J, H, D].
    """
    return attend(q, k, v, layout)


class Projections(nn.Module):
    """Queries, keys and values of one stream, and the way back to its width.

    Separate matrices, so that each can be cut by heads; how many heads there are is read off the
    weights' output, so that a cut model runs the same code.
    """

    def __init__(self, width: int, config: MMDiTConfig, has_out: bool, out_bias: bool) -> None:
        super().__init__()
        self.head_dim = config.dim_of_head
        inner = config.num_heads * self.head_dim
        inner_kv = config.kv_heads * self.head_dim
        has_norm = config.qk_norm == "rms"
        self.q = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(width, inner_kv, bias=config.qkv_bias)
        self.v = nn.Linear(width, inner_kv, bias=config.qkv_bias)
        self.q_norm = HeadNorm(self.head_dim, config.norm_eps) if has_norm else None
        self.k_norm = HeadNorm(self.head_dim, config.norm_eps) if has_norm else None
        self.out = nn.Linear(inner, width, bias=out_bias) if has_out else None

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [N, d] -> q [N, H, D], k and v [N, H_kv, D]."""
        heads = (-1, self.head_dim)
        q, k, v = (linear(x).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, rotary), self.k_norm(k, rotary)
        elif rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v


class StreamLayer(nn.Module):
    """One stream's share of a joint block.

    `is_last` leaves out everything after attention: nothing could use it.
    """

    def __init__(self, width: int, config: MMDiTConfig, is_last: bool) -> None:
        super().__init__()
        self.modulation = Modulation(
            config.width_of_condition,
            width,
            1 if is_last else 2,
            has_shift=config.modulation == "shift_scale_gate",
            has_gate=not is_last,
            rank=config.modulation_rank,
        )
        self.attention_prenorm = AdaNorm(width, config.norm_eps, config.block_norm)
        self.attention = Projections(width, config, not is_last, config.bias)
        self.mlp: MLP | None = None
        if not is_last:
            self.mlp_prenorm = AdaNorm(width, config.norm_eps, config.block_norm)
            self.mlp = MLP(width, config.hidden(width), config.activation, config.bias)
        has_postnorm = config.sandwich_norm and not is_last
        self.attention_postnorm = RMSNorm(width, config.norm_eps) if has_postnorm else None
        self.mlp_postnorm = RMSNorm(width, config.norm_eps) if has_postnorm else None

    def before(
        self, x: Tensor, rows: list[Rows], level: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [N, d] -> this stream's q, k, v."""
        q, k, v = self.attention(self.attention_prenorm(x, rows[0], level), rotary)
        return q, k, v

    def after(self, x: Tensor, attended: Tensor, rows: list[Rows], level: Tensor) -> Tensor:
        """`x` [N, d] and `attended` [N, H, D] -> [N, d]."""
        if self.mlp is None or self.attention.out is None:
            return x
        branch = self.attention.out(attended.flatten(-2))
        x = self._add(x, branch, rows[0], self.attention_postnorm, level)
        branch = self.mlp(self.mlp_prenorm(x, rows[1], level))
        return self._add(x, branch, rows[1], self.mlp_postnorm, level)

    @staticmethod
    def _add(
        x: Tensor, branch: Tensor, rows: Rows, postnorm: RMSNorm | None, level: Tensor
    ) -> Tensor:
        assert rows.gate is not None
        branch = branch if postnorm is None else postnorm(branch)
        return gated_add(x, rows.gate, branch, level)


class JointBlock(nn.Module):
    """Streams with weights of their own that attend to each other's tokens."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.streams = nn.ModuleDict(
            {
                name: StreamLayer(config.stream_width(name), config, config.is_last(name, index))
                for name in config.streams
            }
        )

    def forward(self, x: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """`x`: stream -> [N, d] -> the same."""
        layers = {name: cast(StreamLayer, layer) for name, layer in self.streams.items()}
        rows = {
            name: layer.modulation(context.condition, context.shared.get(name))
            for name, layer in layers.items()
        }
        parts = [
            layer.before(x[name], rows[name], context.level[name], context.rotary[name])
            for name, layer in layers.items()
        ]
        q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        joint = call_attention(context.attend, q, k, v, context.layout)
        attended = torch.split(joint, [x[name].shape[0] for name in layers])
        return {
            name: layer.after(x[name], part, rows[name], context.level[name])
            for (name, layer), part in zip(layers.items(), attended, strict=True)
        }


class SingleBlock(nn.Module):
    """One set of weights for the tokens of all streams; attention and MLP side by side."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.stream_width(next(iter(config.streams)))
        self.modulation = Modulation(
            config.width_of_condition,
            width,
            1,
            has_shift=config.modulation == "shift_scale_gate",
            rank=config.modulation_rank,
        )
        self.prenorm = AdaNorm(width, config.norm_eps, config.block_norm)
        # One bias for the sum of both ways out: the MLP's.
        self.attention = Projections(width, config, has_out=True, out_bias=False)
        self.mlp = MLP(width, config.hidden(width), config.activation, config.bias)
        self.postnorm = RMSNorm(width, config.norm_eps) if config.sandwich_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`x` [J, d] -> [J, d]; `context` must be the merged one."""
        level = context.level[ALL]
        (rows,) = self.modulation(context.condition, context.shared.get(ALL))
        normed = self.prenorm(x, rows, level)
        q, k, v = self.attention(normed, context.rotary[ALL])
        attended = call_attention(context.attend, q, k, v, context.layout)
        assert self.attention.out is not None and rows.gate is not None
        branch = self.attention.out(attended.flatten(-2)) + self.mlp(normed)
        branch = branch if self.postnorm is None else self.postnorm(branch)
        return gated_add(x, rows.gate, branch, level)
