"""Transformer blocks: joint (each stream its own weights) and single (one set for all tokens).

The joint block is Esser et al., "Scaling rectified flow transformers" (SD3, arXiv 2403.03206),
figure 2, for any number of streams; the single block with parallel attention and MLP is FLUX's,
after Dehghani et al. (ViT-22B, arXiv 2302.05442), section 2.

Shape legend: N tokens of one stream, M of its tokens that matrices see (N in one process), J tokens
of all streams (stream-major), d width, H heads, D head dim, P = D / 2, K rows of the noise-level
table, c width of the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.context import ALL, Context, Rotary, call_attention
from kinodit.models.mlp import MLP
from kinodit.models.modulation import AdaNorm, Modulation, Rows, gated_add
from kinodit.models.moe.layer import MoE
from kinodit.models.norm import HeadNorm, RMSNorm
from kinodit.models.rope import rotate


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


def feed_forward(width: int, config: MMDiTConfig, name: str, index: int) -> MLP | MoE:
    """The feed-forward of the stream `name`, or of `SINGLE`, or the experts in its place."""
    experts = config.experts_in(name, index)
    if experts is not None:
        streams = tuple(config.streams) if name == SINGLE else (name,)
        condition_width = config.width_of_condition
        return MoE(width, experts, config.activation, config.bias, condition_width, streams)
    return MLP(width, config.hidden(width), config.activation, config.bias)


class StreamLayer(nn.Module):
    """The share of the stream `name` in joint block `index`.

    Where the stream ends, everything after attention is left out: nothing could use it.
    """

    def __init__(self, name: str, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        width, is_last = config.stream_width(name), config.is_last(name, index)
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
        self.mlp: MLP | MoE | None = None
        if not is_last:
            self.mlp_prenorm = AdaNorm(width, config.norm_eps, config.block_norm)
            self.mlp = feed_forward(width, config, name, index)
        has_postnorm = config.sandwich_norm and not is_last
        self.attention_postnorm = RMSNorm(width, config.norm_eps) if has_postnorm else None
        self.mlp_postnorm = RMSNorm(width, config.norm_eps) if has_postnorm else None

    def after(self, x: Tensor, branch: Tensor, rows: Rows, level: Tensor) -> Tensor:
        """`x` [N, d] with the attention's `branch` [N, d] added."""
        return self._add(x, branch, rows, self.attention_postnorm, level)

    def after_mlp(self, x: Tensor, branch: Tensor, rows: Rows, level: Tensor) -> Tensor:
        """`x` [N, d] with the feed-forward's `branch` [N, d] added."""
        return self._add(x, branch, rows, self.mlp_postnorm, level)

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
            {name: StreamLayer(name, config, index) for name in config.streams}
        )

    def forward(self, x: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """`x`: stream -> [N, d] -> the same.

        What crosses between processes does so for all streams at once.
        """
        layers = {name: cast(StreamLayer, layer) for name, layer in self.streams.items()}
        rows = context.rows({name: layer.modulation for name, layer in layers.items()})
        attended = self._attend(layers, x, rows, context)
        branches = context.scatter(
            {
                name: layer.attention.out(attended[name])
                for name, layer in layers.items()
                if layer.attention.out is not None
            }
        )
        going_on = {name: layers[name] for name in branches}
        x = {**x}
        for name, layer in going_on.items():
            x[name] = layer.after(x[name], branches[name], rows[name][0], context.level[name])
        normed = {
            name: layer.mlp_prenorm(x[name], rows[name][1], context.level[name])
            for name, layer in going_on.items()
        }
        hidden = context.gather(normed)
        branches = context.scatter(
            {
                name: context.feed_forward(layer.mlp, name, hidden[name])
                for name, layer in going_on.items()
                if layer.mlp is not None
            }
        )
        for name, layer in going_on.items():
            x[name] = layer.after_mlp(x[name], branches[name], rows[name][1], context.level[name])
        return x

    @staticmethod
    def _attend(
        layers: Mapping[str, StreamLayer],
        x: Mapping[str, Tensor],
        rows: Mapping[str, list[Rows]],
        context: Context,
    ) -> dict[str, Tensor]:
        """stream -> [M, H * D]: what the joint attention gives to its tokens."""
        normed = {
            name: layer.attention_prenorm(x[name], rows[name][0], context.level[name])
            for name, layer in layers.items()
        }
        seen = context.gather(normed)
        parts = [
            layer.attention(seen[name], context.rotary[name]) for name, layer in layers.items()
        ]
        q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        joint = call_attention(context.attend, q, k, v, context.layout).flatten(-2)
        sizes = [context.num_seen[name] for name in layers]
        return dict(zip(layers, torch.split(joint, sizes), strict=True))


class SingleBlock(nn.Module):
    """One set of weights for the tokens of all streams; attention and MLP side by side."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
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
        self.mlp = feed_forward(width, config, SINGLE, index)
        self.postnorm = RMSNorm(width, config.norm_eps) if config.sandwich_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`x` [J, d] -> [J, d]; `context` must be the merged one."""
        level = context.level[ALL]
        (rows,) = context.rows({ALL: self.modulation})[ALL]
        normed = context.gather({ALL: self.prenorm(x, rows, level)})[ALL]
        q, k, v = self.attention(normed, context.rotary[ALL])
        attended = call_attention(context.attend, q, k, v, context.layout)
        assert self.attention.out is not None and rows.gate is not None
        both = self.attention.out(attended.flatten(-2))
        both = both + context.feed_forward(self.mlp, ALL, normed)
        branch = context.scatter({ALL: both})[ALL]
        branch = branch if self.postnorm is None else self.postnorm(branch)
        return gated_add(x, rows.gate, branch, level)
