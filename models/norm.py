"""Normalisation layers: RMSNorm with a learned scale, and LayerNorm without one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich, 1910.07467, eq. 4).

    Over the last dim only: as QK norm it acts per head, so that the result does not depend on how
    many heads a device holds. Statistics are taken in at least float32.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] -> same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim without scale and shift; those come from the modulation."""
    return F.layer_norm(x, x.shape[-1:], None, None, eps)
