"""adaLN modulation: one row of shifts, scales and gates per distinct (segment, noise level).

adaLN-Zero is Peebles and Xie, "Scalable diffusion models with transformers" (arXiv 2212.09748),
section 3.2. The rows are computed once per row of the batch's table of noise levels, never per
token, and looked up by each token; the backward sums over each row's tokens. No [N, d] copy of a
shift, scale or gate outlives the op that looked it up.

Shape legend: N tokens, d width, c width of the condition, K rows of the noise-level table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.norm import RMSNorm


class Rows(NamedTuple):
    """What the condition does to one branch, [K, d] each; `shift` and `gate` may be left out."""

    shift: Tensor | None
    scale: Tensor
    gate: Tensor | None


class Modulation(nn.Module):
    """From the activated condition to the rows of `branches` branches of a stream.

    With a shift (adaLN-Zero) a branch has shift, scale, gate in this order; without (Next-DiT,
    arXiv 2406.18583, section 2.1) scale, gate, and the gate goes through tanh. `rank` above 0 is
    adaLN-LoRA (FiTv2, arXiv 2410.13925): a product of two thin matrices, to which `forward` adds
    the rows of a matrix shared by all blocks.
    """

    def __init__(
        self,
        condition_width: int,
        width: int,
        branches: int,
        *,
        has_shift: bool = True,
        has_gate: bool = True,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.branches, self.has_shift, self.has_gate = branches, has_shift, has_gate
        parts = branches * (1 + has_shift + has_gate)
        self.down = nn.Linear(condition_width, rank, bias=False) if rank else None
        self.linear = nn.Linear(rank or condition_width, parts * width)

    def forward(self, condition: Tensor, shared: Tensor | None = None) -> list[Rows]:
        """`condition` [K, c], `shared` [K, at least parts * d] -> the rows of each branch."""
        return self.rows(self.project(condition), shared)

    def project(self, condition: Tensor) -> Tensor:
        """`condition` [K, c] -> [K, parts * d], or those columns that this module holds."""
        if self.down is not None:
            condition = self.down(condition)
        out: Tensor = self.linear(condition)
        return out

    def rows(self, projected: Tensor, shared: Tensor | None = None) -> list[Rows]:
        """`projected` [K, parts * d], `shared` as in `forward` -> the rows of each branch."""
        if shared is not None:
            projected = projected + shared.narrow(1, 0, projected.shape[1])
        per_branch = 1 + self.has_shift + self.has_gate
        # One split: its backward writes all gradients to where they belong, without a copy each.
        parts = projected.chunk(self.branches * per_branch, dim=-1)
        return [self._branch(parts[i : i + per_branch]) for i in range(0, len(parts), per_branch)]

    def _branch(self, parts: Sequence[Tensor]) -> Rows:
        shift = parts[0] if self.has_shift else None
        scale = parts[int(self.has_shift)]
        gate = parts[-1] if self.has_gate else None
        if gate is not None and not self.has_shift:
            gate = gate.tanh()
        return Rows(shift, scale, gate)


class AdaNorm(nn.Module):
    """The norm before a branch, shifted and scaled by the condition.

    `kind` "layer" has no weights of its own, "rms" has.
    """

    def __init__(self, width: int, eps: float, kind: Literal["layer", "rms"]) -> None:
        super().__init__()
        self.eps = eps
        self.norm = RMSNorm(width, eps) if kind == "rms" else None

    def forward(self, x: Tensor, rows: Rows, level: Tensor) -> Tensor:
        """`x` [N, d], `level` [N] -> [N, d]."""
        if self.norm is None and rows.shift is not None:
            return modulated_norm(x, rows.shift, rows.scale, level, self.eps)
        if self.norm is None:
            normed = F.layer_norm(x, x.shape[-1:], None, None, self.eps)
        else:
            normed = self.norm(x)
        normed = normed * per_token(1 + rows.scale, level)
        return normed if rows.shift is None else normed + per_token(rows.shift, level)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, level: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; `x` [N, d], `shift` and `scale` [K, d], `level` [N].

    The norm has no weights of its own, and takes its statistics in at least float32.
    """
    shift, scale = shift.to(x.dtype), scale.to(x.dtype)
    if scale.shape[0] == 1:
        # One level for all tokens: they are the norm's weight and bias, fused in its kernel.
        return F.layer_norm(x, x.shape[-1:], (1 + scale).squeeze(0), shift.squeeze(0), eps)
    if torch.compiler.is_compiling():
        normed = F.layer_norm(x, x.shape[-1:], None, None, eps)
        return torch.addcmul(per_token(shift, level), normed, per_token(1 + scale, level))
    out: Tensor = _ModulatedNorm.apply(x, shift, scale, level, eps)  # type: ignore[no-untyped-call]
    return out


def gated_add(x: Tensor, gate: Tensor, branch: Tensor, level: Tensor) -> Tensor:
    """x + gate * branch; `x` and `branch` [N, d], `gate` [K, d], `level` [N]."""
    gate = gate.to(branch.dtype)
    if torch.compiler.is_compiling():
        return x + per_token(gate, level) * branch
    out: Tensor = _GatedAdd.apply(x, gate, branch, level)  # type: ignore[no-untyped-call]
    return out


def per_token(rows: Tensor, level: Tensor) -> Tensor:
    """Rows [K, d] of each token's noise level: [N, d], or [1, d] when there is one row for all."""
    if rows.shape[0] == 1:
        return rows
    out: Tensor = _Lookup.apply(rows, level)  # type: ignore[no-untyped-call]
    return out


def segment_sum(x: Tensor, level: Tensor, num_rows: int) -> Tensor:
    """[K, d] sums of `x` [N, d] over the tokens of each level, accumulated in at least float32."""
    if x.device.type == "cpu":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = wide.new_zeros(num_rows, x.shape[1]).index_add_(0, level, wide)
        return sums.to(x.dtype)
    # On a GPU index_add is atomic: slow on few rows, and of no fixed order. A product with the
    # one-hot matrix is neither.
    rows = torch.arange(num_rows, device=x.device)
    return (rows.unsqueeze(1) == level.unsqueeze(0)).to(x.dtype) @ x


class _Lookup(torch.autograd.Function):
    """rows[level], whose backward is a segment sum instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, level: Tensor) -> Tensor:
        ctx.save_for_backward(level)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, level)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (level,) = ctx.saved_tensors
        return segment_sum(grad, level, ctx.num_rows), None


class _ModulatedNorm(torch.autograd.Function):
    """`modulated_norm` that keeps the normed tokens, their statistics and the rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, level: Tensor, eps: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            normed, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(normed, rstd, scale, level)
        scale_Nd = (1 + scale).index_select(0, level)
        return torch.addcmul(shift.index_select(0, level), normed, scale_Nd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, rstd, scale, level = ctx.saved_tensors
        grad_shift = segment_sum(grad, level, scale.shape[0])
        grad_scale = segment_sum(grad * normed, level, scale.shape[0])
        grad_normed = (1 + scale).index_select(0, level).mul_(grad)
        # The kernel norms its input again: what is normed already has mean 0 and deviation 1.
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, normed, normed.shape[-1:], mean, one, None, None, [True, False, False]
        )
        return grad_x.mul_(rstd), grad_shift, grad_scale, None, None


class _GatedAdd(torch.autograd.Function):
    """`gated_add` that keeps the branch and the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, level: Tensor) -> Tensor:
        ctx.save_for_backward(gate, branch, level)
        if gate.shape[0] == 1:
            return torch.addcmul(x, gate, branch)
        return gate.index_select(0, level).mul_(branch).add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch, level = ctx.saved_tensors
        if gate.shape[0] == 1:
            grad_gate = (grad * branch).sum(0, keepdim=True)
            return grad, grad_gate, grad * gate, None
        grad_gate = segment_sum(grad * branch, level, gate.shape[0])
        return grad, grad_gate, gate.index_select(0, level).mul_(grad), None
