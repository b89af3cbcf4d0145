"""Feed-forward layers.

Shape legend: N tokens, d width, h hidden width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

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
        elif self.activation == "silu":
            h_Nh = F.silu(h_Nh)
        else:
            h_Nh = gelu_tanh(h_Nh)
        out: Tensor = self.down(h_Nh)
        return out


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, 1606.08415, section 2).

    x (1 + tanh u) / 2 = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3). On a CPU, tanh
    costs 3.5 times what sigmoid does, and is 3 % of a training step.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(_doubled_u(x))
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        out: Tensor = _GeluTanh.apply(x)
        return out
    return F.gelu(x, approximate="tanh")


LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


def _doubled_u(x: Tensor) -> Tensor:
    """2u = x (LINEAR + CUBIC x^2)."""
    return (x * x).mul_(CUBIC).add_(LINEAR).mul_(x)


class _GeluTanh(torch.autograd.Function):
    """`gelu_tanh` that keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _doubled_u(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = _doubled_u(x).sigmoid_()
        # d/dx [x s] = s + x s (1 - s) (2u)' and x (2u)' = x (LINEAR + 3 CUBIC x^2)
        slope = (x * x).mul_(3 * CUBIC).add_(LINEAR).mul_(x)
        slope.mul_(1 - sigmoid).add_(1).mul_(sigmoid)
        return slope.mul_(grad)
