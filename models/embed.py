"""What turns latents, noise levels and condition vectors into vectors of the model's width.

Shape legend: N tokens, C channels of a token, d width, c width of the condition, S segments,
K rows of the noise-level table, F sine features, H heads, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.attention import attend_within
from kinodit.models.config import MMDiTConfig
from kinodit.models.exchange import Exchange
from kinodit.models.mlp import MLP
from kinodit.models.modulation import gated_add
from kinodit.models.rope import sincos_2d
from kinodit.models.tokens import ModalityTokens, TokenBatch

NUM_FEATURES = 256


def timestep_features(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[K] numbers -> [K, F] features of 1000 * value, cosines first.

    128 frequencies 10000^(-j / 128) (Vaswani et al., 1706.03762, section 3.5, in the order that
    DiT, SD3 and FLUX use), computed in `dtype`.
    """
    half = NUM_FEATURES // 2
    exponent = torch.arange(half, dtype=dtype, device=value.device) / half
    angle_KF = 1000 * value.unsqueeze(-1).to(dtype) * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle_KF.cos(), angle_KF.sin()], dim=-1)


class VectorMLP(nn.Module):
    """Linear, SiLU, linear: from a vector or from sine features to the condition's width."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(in_features, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[K, in_features] -> [K, c]."""
        out: Tensor = self.output(F.silu(self.input(x.to(self.input.weight.dtype))))
        return out


class ConditionEmbed(nn.Module):
    """The condition c of each row of the noise-level table: its time and its segment's vectors."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.kinds = {name: condition.kind for name, condition in config.conditions.items()}
        width = config.width_of_condition
        self.time = VectorMLP(NUM_FEATURES, width)
        self.vectors = nn.ModuleDict(
            {
                name: VectorMLP(
                    NUM_FEATURES if condition.kind == "scalar" else condition.dim, width
                )
                for name, condition in config.conditions.items()
            }
        )

    def forward(self, batch: TokenBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[K, c], not activated, and the part of it that is time's; features are of `dtype`."""
        time_Kc: Tensor = self.time(timestep_features(batch.level_t, dtype))
        c_Kc = time_Kc
        for name, embed in self.vectors.items():
            value = batch.conditions[name]
            if self.kinds[name] == "scalar":
                value = timestep_features(value.squeeze(-1), dtype)
            c_Kc = c_Kc + embed(value).index_select(0, batch.level_segment)
        return c_Kc, time_Kc


class StreamEmbed(nn.Module):
    """From a stream's latents to its width, with its sine positions or its refiner if any."""

    def __init__(self, name: str, config: MMDiTConfig) -> None:
        super().__init__()
        stream = config.streams[name]
        width = config.stream_width(name)
        self.name, self.stream = name, stream
        self.linear = nn.Linear(stream.in_channels, width)
        self.refiner = TokenRefiner(name, config) if stream.refiner_blocks else None

    def forward(
        self,
        tokens: ModalityTokens,
        batch: TokenBatch,
        dtype: torch.dtype,
        exchange: Exchange | None = None,
    ) -> Tensor:
        """[N, d]; positions and times are computed in `dtype`."""
        own: Tensor | None = None
        if self.refiner is not None and exchange is not None:
            # The refiner looks at a whole stream: each process has it do so, and keeps its own.
            tokens, own = exchange.whole(self.name, batch)
        latents = tokens.latents.to(self.linear.weight.dtype)
        x: Tensor = self.linear(latents)
        if self.stream.position == "sincos_2d":
            scale = self.stream.position_scale
            x = x + sincos_2d(tokens.position, x.shape[1], scale, dtype).to(x.dtype)
        if self.refiner is not None:
            x = self.refiner(x, latents, tokens, batch, dtype)
        return x if own is None else x.index_select(0, own)


class TokenRefiner(nn.Module):
    """Self-attention among a segment's text tokens before they meet the others.

    HunyuanVideo (arXiv 2412.03603), section 4.3: a decoder-only language model gives causal
    features; two blocks of bidirectional attention complete them. Gated by the time and by the
    mean of the segment's features.
    """

    def __init__(self, name: str, config: MMDiTConfig) -> None:
        super().__init__()
        stream, width = config.streams[name], config.stream_width(name)
        self.time = VectorMLP(NUM_FEATURES, width)
        self.pooled = VectorMLP(stream.in_channels, width)
        self.blocks = nn.ModuleList(
            RefinerBlock(width, config) for _ in range(stream.refiner_blocks)
        )

    def forward(
        self,
        x: Tensor,
        latents: Tensor,
        tokens: ModalityTokens,
        batch: TokenBatch,
        dtype: torch.dtype,
    ) -> Tensor:
        """`x` [N, d], `latents` [N, C] -> [N, d]."""
        mean_SC = segment_mean(latents, tokens.segment, batch.num_segments)
        condition = self.time(timestep_features(batch.level_t, dtype))
        pooled = self.pooled(mean_SC).index_select(0, batch.level_segment)
        condition = F.silu(condition + pooled)
        for block in self.blocks:
            x = block(x, condition, tokens, batch.num_segments)
        return x


class RefinerBlock(nn.Module):
    """Pre-norm attention and MLP whose branches are gated by the condition."""

    def __init__(self, width: int, config: MMDiTConfig) -> None:
        super().__init__()
        self.head_dim = config.dim_of_head
        inner = config.num_heads * self.head_dim
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.q = nn.Linear(width, inner)
        self.k = nn.Linear(width, inner)
        self.v = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)
        self.mlp_norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp = MLP(width, round(config.mlp_ratio * width), "silu", bias=True)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(
        self, x: Tensor, condition: Tensor, tokens: ModalityTokens, num_segments: int
    ) -> Tensor:
        """`x` [N, d], `condition` [K, d], activated -> [N, d]."""
        attention_gate, mlp_gate = self.modulation(condition).chunk(2, dim=-1)
        normed = self.attention_norm(x)
        heads = (-1, self.head_dim)
        q, k, v = (linear(normed).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        attended = attend_within(q, k, v, tokens.segment, num_segments)
        x = gated_add(x, attention_gate, self.out(attended.flatten(-2)), tokens.level)
        return gated_add(x, mlp_gate, self.mlp(self.mlp_norm(x)), tokens.level)


def segment_mean(x: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """[S, C] means of `x` [N, C] over each segment's tokens, 0 for a segment without any.

    A product with the one-hot matrix: no scatter, hence a fixed order of summation on any device.
    """
    rows = torch.arange(num_segments, device=segment.device)
    one_hot = (rows.unsqueeze(1) == segment.unsqueeze(0)).to(
        torch.promote_types(x.dtype, torch.float32)
    )
    counts = one_hot.sum(1, keepdim=True).clamp_min(1)
    return ((one_hot @ x.to(one_hot.dtype)) / counts).to(x.dtype)
