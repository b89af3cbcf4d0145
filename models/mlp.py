"""Feed-forward layers.

Shape legend: N tokens, d width, h hidden width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu_tanh", "silu", "swiglu"]


def hidden_width(width: int, ratio: float, activation: Activation) -> int:
    """Hidden width of an MLP. A gated one has three matrices: 2/3 of the ratio, in steps of 16."""
    hidden = round(width * ratio)
    return 16 * max(1, round(hidden * 2 / 3 / 16)) if activation == "swiglu" else hidden


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
        else:
            h_Nh = activated(h_Nh, self.activation)
        out: Tensor = self.down(h_Nh)
        return out


def activated(x: Tensor, activation: Activation) -> Tensor:
    """An activation without a gate, element-wise."""
    return F.silu(x) if activation == "silu" else gelu_tanh(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, 1606.08415, section 2), element-wise.

    x (1 + tanh u) / 2 = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3). A compiler fuses
    either; on a CPU the exponential of the second costs a third of the first one's tanh.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    doubled_u = 2 * math.sqrt(2 / math.pi) * wide * (1 + 0.044715 * wide * wide)
    return (wide * torch.sigmoid(doubled_u)).to(x.dtype)
