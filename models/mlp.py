"""Feed-forward layers.

Shape legend: N tokens, d width, h hidden width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu_tanh", "silu", "swiglu"]


def hidden_width(width: int, ratio: float, activation: Activation) -> int:
    """Hidden width of an MLP. A gated one has three matrices: 2/3 of the ratio, in steps of 16."""
    hidden = round(width * ratio)
    return 16 * round(hidden * 2 / 3 / 16) if activation == "swiglu" else hidden


class MLP(nn.Module):
    """down(activation(up(x))), or for SwiGLU down(silu(gate(x)) * up(x)) (Shazeer, 2002.05202)."""

    def __init__(self, width: int, hidden: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if activation == "swiglu" else None
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, d] -> [N, d]."""
        h_Nh = self.up(x)
        if self.gate is not None:
            h_Nh = F.silu(self.gate(x)) * h_Nh
        elif self.activation == "silu":
            h_Nh = F.silu(h_Nh)
        else:
            h_Nh = F.gelu(h_Nh, approximate="tanh")
        out: Tensor = self.down(h_Nh)
        return out
