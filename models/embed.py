"""What turns latents, noise levels and condition vectors into vectors of the model's width.

Shape legend: N tokens, C channels of a token, d width, c width of the condition, S segments,
K rows of the noise-level table, F sine features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FREQUENCIES = 256


def timestep_features(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[K] numbers -> [K, F] features of 1000 * value, cosines first.

    128 frequencies 10000^(-j / 128) (Vaswani et al., 1706.03762, section 3.5, in the order that
    DiT, SD3 and FLUX use), computed in `dtype`.
    """
    half = NUM_FREQUENCIES // 2
    exponent = torch.arange(half, dtype=dtype, device=value.device) / half
    angle_KF = 1000 * value[:, None].to(dtype) * torch.exp(-math.log(10000) * exponent)
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
