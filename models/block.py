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

import torch
from torch import Tensor, nn

from kinodit.models.attention import AttentionOp
from kinodit.models.mlp import MLP, Activation
from kinodit.models.modulation import Modulation, gated_add, modulated_norm
from kinodit.models.norm import HeadNorm
from kinodit.models.rope import rotate
from kinodit.models.tokens import AttentionLayout

Rotary = Tensor | None


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a model have in common (see `MMDiTConfig` for the meaning)."""

    condition_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    qkv_bias: bool
    bias: bool
    activation: Activation
    norm_eps: float


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass sees besides the tokens.

    Not a pytree on purpose: a wrapper that casts the floating inputs of a block to bf16 must not
    reach the rotary tables.

    condition: [K, c], activated
    level:     stream -> [N] int64, each token's row of `condition`
    rotary:    stream -> cosines and sines [N, P, 2], or None for a stream that is not rotated
    layout:    who attends to whom
    attend:    the attention op
    """

    condition: Tensor
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


ALL = "all"
"""The name of the one stream that single blocks see."""


def merged_table(rotary: Mapping[str, Rotary], level: Mapping[str, Tensor]) -> Rotary:
    """The tables of all streams one after the other; a stream without one is turned by 0."""
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


@torch.compiler.disable
def call_attention(
    attend: AttentionOp, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout
) -> Tensor:
    """`attend`, kept out of compiled graphs: a layout is different in every batch."""
    return attend(q, k, v, layout)


class Projections(nn.Module):
    """Queries, keys and values of one stream, and the way back to its width."""

    def __init__(self, width: int, options: BlockOptions, has_out: bool, out_bias: bool) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        inner = options.num_heads * options.head_dim
        inner_kv = options.num_kv_heads * options.head_dim
        self.q = nn.Linear(width, inner, bias=options.qkv_bias)
        self.k = nn.Linear(width, inner_kv, bias=options.qkv_bias)
        self.v = nn.Linear(width, inner_kv, bias=options.qkv_bias)
        self.q_norm = HeadNorm(options.head_dim, options.norm_eps) if options.qk_norm else None
        self.k_norm = HeadNorm(options.head_dim, options.norm_eps) if options.qk_norm else None
        self.out = nn.Linear(inner, width, bias=out_bias) if has_out else None

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [N, d] -> q [N, H, D], k and v [N, H_kv, D]; H is what the weights hold."""
        heads = (-1, self.head_dim)
        q, k, v = (linear(x).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, rotary), self.k_norm(k, rotary)
        elif rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v


class StreamLayer(nn.Module):
    """One stream's share of a joint block.

    `is_last` leaves out everything after attention: the stream has no output that could use it
    (SD3's `pre_only` context block).
    """

    def __init__(self, width: int, hidden: int, options: BlockOptions, is_last: bool) -> None:
        super().__init__()
        self.eps = options.norm_eps
        self.modulation = Modulation(options.condition_width, width, 2 if is_last else 6)
        self.attention = Projections(width, options, not is_last, options.bias)
        self.mlp = None if is_last else MLP(width, hidden, options.activation, options.bias)

    def before(
        self, x: Tensor, modulation: tuple[Tensor, ...], level: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [N, d] -> this stream's q, k, v."""
        shift, scale = modulation[:2]
        return self.attention(modulated_norm(x, shift, scale, level, self.eps), rotary)

    def after(
        self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], level: Tensor
    ) -> Tensor:
        """`x` [N, d] and `attended` [N, H, D] -> [N, d]."""
        if self.mlp is None or self.attention.out is None:
            return x
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = gated_add(x, gate, self.attention.out(attended.flatten(-2)), level)
        normed = modulated_norm(x, mlp_shift, mlp_scale, level, self.eps)
        return gated_add(x, mlp_gate, self.mlp(normed), level)


class JointBlock(nn.Module):
    """Streams with weights of their own that attend to each other's tokens."""

    def __init__(
        self,
        widths: Mapping[str, int],
        hidden: Mapping[str, int],
        options: BlockOptions,
        without_output: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.streams = nn.ModuleDict(
            {
                name: StreamLayer(width, hidden[name], options, name in without_output)
                for name, width in widths.items()
            }
        )

    def forward(self, x: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """`x`: stream -> [N, d] -> the same."""
        layers: dict[str, StreamLayer] = dict(self.streams.items())  # type: ignore[arg-type]
        modulation = {name: layer.modulation(context.condition) for name, layer in layers.items()}
        parts = [
            layer.before(x[name], modulation[name], context.level[name], context.rotary[name])
            for name, layer in layers.items()
        ]
        q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        joint = call_attention(context.attend, q, k, v, context.layout)
        attended = torch.split(joint, [x[name].shape[0] for name in layers])
        return {
            name: layer.after(x[name], part, modulation[name], context.level[name])
            for (name, layer), part in zip(layers.items(), attended, strict=True)
        }


class SingleBlock(nn.Module):
    """One set of weights for the tokens of all streams; attention and MLP side by side."""

    def __init__(self, width: int, hidden: int, options: BlockOptions) -> None:
        super().__init__()
        self.eps = options.norm_eps
        self.modulation = Modulation(options.condition_width, width, 3)
        self.attention = Projections(width, options, has_out=True, out_bias=False)
        self.mlp = MLP(width, hidden, options.activation, options.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`x` [J, d] -> [J, d]; `context` must be the merged one."""
        level = context.level[ALL]
        shift, scale, gate = self.modulation(context.condition)
        normed = modulated_norm(x, shift, scale, level, self.eps)
        q, k, v = self.attention(normed, context.rotary[ALL])
        attended = call_attention(context.attend, q, k, v, context.layout)
        assert self.attention.out is not None
        branch = self.attention.out(attended.flatten(-2)) + self.mlp(normed)
        return gated_add(x, gate, branch, level)
