"""Experts: feed-forwards whose weights are stacked, applied to rows sorted by expert.

Shape legend: E experts, R rows, d width, h hidden width of an expert, i and o inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.mlp import Activation, activated
from kinodit.models.modulation import per_token

Read = Callable[["Experts"], nn.Module]
"""Makes something of the weights of experts."""


class Experts(nn.Module):
    """E feed-forwards of the form of `MLP`: up and gate [E, h, d], down [E, d, h]."""

    def __init__(
        self, num_experts: int, width: int, hidden: int, activation: Activation, bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        has_gate = activation == "swiglu"
        wide, narrow = (num_experts, hidden, width), (num_experts, width, hidden)
        self.up = nn.Parameter(torch.empty(wide))
        self.gate = nn.Parameter(torch.empty(wide)) if has_gate else None
        self.down = nn.Parameter(torch.empty(narrow))
        self.up_bias = nn.Parameter(torch.zeros(wide[:2])) if bias else None
        self.gate_bias = nn.Parameter(torch.zeros(wide[:2])) if bias and has_gate else None
        self.down_bias = nn.Parameter(torch.zeros(narrow[:2])) if bias else None

    def forward(self, x: Tensor, counts: Tensor, read: Read | None = None) -> Any:
        """`x` [R, d], the first counts[0] rows for the first expert and so on -> [R, d].

        counts: [E] int64; their sum is R. An expert without rows gets a gradient of zero.
        read:   what to return instead: where weights are shared, they are there in here alone
        """
        if read is not None:
            return read(self)
        hidden = grouped_linear(x, self.up, self.up_bias, counts)
        if self.gate is not None:
            hidden = F.silu(grouped_linear(x, self.gate, self.gate_bias, counts)) * hidden
        else:
            hidden = activated(hidden, self.activation)
        return grouped_linear(hidden, self.down, self.down_bias, counts)


Beside = Callable[[], Tensor]
"""Computes something that does not depend on experts."""


class ExpertOp(Protocol):
    """Applies `experts` to rows sorted by expert; where experts lie elsewhere, rows travel."""

    def __call__(
        self, experts: nn.Module, x: Tensor, counts: Tensor, beside: Beside | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`x` [R, d] and `counts` [E] of all experts -> [R, d], in the same order.

        Also what `beside` gives, which is computed while rows travel.
        """
        ...


def apply_experts(
    experts: nn.Module, x: Tensor, counts: Tensor, beside: Beside | None = None
) -> tuple[Tensor, Tensor | None]:
    """The `ExpertOp` of one process, where all experts are: `x` [R, d], `counts` [E] -> [R, d]."""
    out: Tensor = experts(x, counts)
    return out, None if beside is None else beside()


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """`x` [R, i], `weight` [E, o, i], `bias` [E, o] -> [R, o]: rows of group e times weight[e].

    Under autocast in its dtype, as a linear layer.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not fits_grouped(x, weight):
        return looped_product(x, weight, counts, bias)
    out = grouped_product(x, weight, counts)
    if bias is None:
        return out
    return out + per_token(bias, torch.repeat_interleave(counts, output_size=len(out)))


def fits_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether the backend has a grouped product for `x` [R, i] and `weight` [E, o, i].

    It has none for float64, nor for odd widths.
    """
    kinds = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    aligned = all(size * x.itemsize % 16 == 0 for size in weight.shape[1:])
    return x.dtype in kinds and x.dtype == weight.dtype and aligned


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`x` [R, i], `weight` [E, o, i], `counts` [E] -> [R, o]: all groups in one kernel."""
    ends = counts.cumsum(0).to(torch.int32)
    out: Tensor = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    return out


def looped_product(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `grouped_product`, with `bias` [E, o]: group after group. Waits for the counts."""
    groups = x.split(counts.tolist())
    biases = [None] * len(groups) if bias is None else bias.unbind()
    parts = zip(groups, weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(rows, w, b) for rows, w, b in parts])
