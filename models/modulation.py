"""adaLN modulation: one row of shifts, scales and gates per distinct (segment, noise level).

adaLN-Zero is Peebles and Xie, "Scalable diffusion models with transformers" (arXiv 2212.09748),
section 3.2. The rows are computed once per row of the batch's table of noise levels, never per
token, and looked up by each token.

Shape legend: N tokens, d width, c width of the condition, K rows of the noise-level table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kinodit.models.norm import layer_norm


class Modulation(nn.Module):
    """A linear map from the activated condition to `parts` vectors of the stream's width."""

    def __init__(self, condition_width: int, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition_width, parts * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """`condition` [K, c], activated -> `parts` tensors [K, d]."""
        out: tuple[Tensor, ...] = self.linear(condition).chunk(self.parts, dim=-1)
        return out


def per_token(rows: Tensor, level: Tensor) -> Tensor:
    """Rows [K, d] of each token's noise level: [N, d], or [1, d] when there is one row for all."""
    return rows if rows.shape[0] == 1 else rows[level]


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, level: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; `x` [N, d], `shift` and `scale` [K, d], `level` [N]."""
    return torch.addcmul(per_token(shift, level), layer_norm(x, eps), per_token(1 + scale, level))


def gated_add(x: Tensor, gate: Tensor, branch: Tensor, level: Tensor) -> Tensor:
    """x + gate * branch; `x` and `branch` [N, d], `gate` [K, d], `level` [N]."""
    return torch.addcmul(x, per_token(gate, level), branch)
