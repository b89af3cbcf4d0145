"""RMSNorm, and the norm of queries and keys that is fused with their rotation.

Shape legend: N tokens, H heads, D head dim, P = D / 2 pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.rope import rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich, 1910.07467, eq. 4).

    Statistics are taken in at least float32.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] -> same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of queries or keys, then their rotation (QK norm).

    Per head, so that the result does not depend on how many heads a device holds.
    """

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """`x` [N, H, D], `rotary` [N, P, 2] cosines and sines or None -> [N, H, D]."""
        if torch.compiler.is_compiling():
            normed = super().forward(x)
            return normed if rotary is None else rotate(normed, rotary)
        out: Tensor = _NormRotate.apply(x, self.weight, rotary, self.eps)  # type: ignore[no-untyped-call]
        return out


class _NormRotate(torch.autograd.Function):
    """Norm and rotation in one; keeps x and its statistics, nothing in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotary: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rotary, rstd)
        out = (wide * rstd).mul_(weight)
        if rotary is not None:
            as_complex(out).mul_(torch.view_as_complex(rotary).unsqueeze(1))
        normed: Tensor = out.to(x.dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotary, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        if rotary is not None:
            turned_back = as_complex(grad) * torch.view_as_complex(rotary).conj().unsqueeze(1)
            grad = torch.view_as_real(turned_back).flatten(-2)
        normed = x * rstd
        product = grad * normed
        grad_weight = product.sum((0, 1))
        mean = (product @ weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(normed, mean, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def as_complex(x: Tensor) -> Tensor:
    """[..., D] seen as [..., D / 2] complex numbers: adjacent pairs are (real, imaginary).

    A tensor that starts in the middle of a pair of its storage is copied.
    """
    if x.storage_offset() % 2:
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
