"""The layer: route tokens, take them to their experts, put together what comes back.

Shape legend: M tokens seen, N own tokens, E experts, k experts that a token asks for, R rows: pairs
of a token and an expert that it goes to (M k where nothing is dropped), d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kinodit.models.attention import permute
from kinodit.models.mlp import MLP, Activation, hidden_width
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.moe.experts import ExpertOp, Experts
from kinodit.models.moe.prior import divergence, prior_shares
from kinodit.models.moe.router import Choice, Router, Seen
from kinodit.models.moe.tally import Tally


@dataclass(frozen=True)
class Surroundings:
    """What a layer needs to know of the pass that it is part of.

    seen:    of the tokens that it sees
    level_t: [N] float, noise level of each own token
    own:     [M, ...] of the tokens seen -> [N, ...] of the own ones among them
    apply:   applies experts to rows
    is_whole: whether this process has all experts, or its part of each
    """

    seen: Seen
    level_t: Tensor
    own: Callable[[Tensor], Tensor]
    apply: ExpertOp
    is_whole: bool = True


Fuse = Callable[[Tensor, Callable[[], Choice]], nn.Module | None]


class MoE(nn.Module):
    """Experts that tokens are routed to, and maybe one that all of them go to.

    `tally` is what the backward has counted since it was last emptied: each pass counts once,
    whether its blocks are computed again or not, and evaluation not at all.

    fuse: [M] levels and the way to a choice -> one feed-forward in place of the experts, if it can
          be; set for as long as weights stay (`cached_experts`)

    loss_scale, z_scale: what the auxiliary losses of one token are multiplied with; set before a
                         step by whoever balances the pool
    depth:               how many layers share the units of a prior; set by the same
    gradient_scale:      what gradients of auxiliary losses are multiplied with; set by an engine
                         that multiplies the loss
    """

    def __init__(
        self,
        width: int,
        config: ExpertsConfig,
        activation: Activation,
        bias: bool,
        condition_width: int = 0,
        streams: Sequence[str] = ("",),
    ) -> None:
        """`condition_width` is that of noise levels' embeddings; `streams` name the tokens'."""
        super().__init__()
        self.config = config
        hidden = hidden_width(width, config.expert_ratio, activation)
        self.router = Router(width, config, condition_width)
        self.experts = Experts(config.num_experts, width, hidden, activation, bias)
        self.shared: MLP | None = None
        if config.shared_ratio:
            hidden = hidden_width(width, config.shared_ratio, activation)
            self.shared = MLP(width, hidden, activation, bias)
        self.loss_scale: Tensor | float = 0.0
        self.z_scale: Tensor | float = 0.0
        self.depth = 1
        self.gradient_scale = 1.0
        self.tally = Tally(config.num_experts, streams)
        self.fuse: Fuse | None = None

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        """`x` [M, d] -> [M, d]."""
        if self.fuse is not None and around.is_whole and not torch.is_grad_enabled():
            fused = self.fuse(around.seen.level_t, lambda: self.router(x, around.seen))
            if fused is not None:
                out: Tensor = fused(x)
                return out if self.shared is None else out + self.shared(x)
        choice: Choice = self.router(x, around.seen)
        rows = Rows.of(choice)
        order = rows.expert.sort(stable=True).indices
        inverse = torch.empty_like(order)
        inverse.scatter_(0, order, torch.arange(len(order), device=order.device))
        # Not bincount, for which the host waits on CUDA.
        counts = order.new_zeros(self.config.num_experts)
        counts.index_add_(0, rows.expert, torch.ones_like(order))
        spread = _Spread.apply(x, order, inverse, rows)  # type: ignore[no-untyped-call]
        beside = None if self.shared is None else partial(self.shared, x)
        made, shared = around.apply(self.experts, spread, counts, beside)
        made = permute(made, inverse, order)
        out = weighed_sum(made, rows, len(x)).to(made.dtype)
        if shared is not None:
            out = out + shared
        return self._observed(out, choice, around)

    def _observed(self, out: Tensor, choice: Choice, around: Surroundings) -> Tensor:
        """`out`, whose backward also goes through the auxiliary losses, and counts.

        The losses are sums over tokens, so that how tokens are dealt out to packs and processes
        does not matter: the share of choices that the balance loss multiplies scores with (Fedus
        et al., arXiv 2101.03961, equation 4) is that of the whole step before.
        """
        if not torch.is_grad_enabled():
            return out
        index, shares = around.own(choice.index), around.own(choice.shares)
        kept = None if choice.kept is None else around.own(choice.kept)
        logits = None if choice.logits is None else around.own(choice.logits)
        squares = shares.new_zeros(()) if logits is None else logits.logsumexp(-1).square().sum()
        aux = self.z_scale * squares
        if self.router.config.balance == "prior":
            units, width = self.depth * self.config.num_experts, self.depth * self.config.top_k
            prior = prior_shares(around.level_t, self.router.unit, units, width)
            aux = aux + self.loss_scale * divergence(shares / self.depth, prior)
        elif self.router.config.is_learned:
            aux = aux + self.loss_scale * (shares * self.router.load.to(shares.dtype)).sum()
        stream = None if around.seen.stream is None else around.own(around.seen.stream)
        counted = self.tally.count(
            index, kept, shares.detach(), squares.detach(), around.level_t, stream
        )
        aux = aux * self.gradient_scale
        made: Tensor = _Observe.apply(out, aux, lambda: self.tally.add(counted))  # type: ignore[no-untyped-call]
        return made


@dataclass(frozen=True)
class Rows:
    """Pairs of a token and an expert that it goes to, token after token.

    expert: [R] int64
    gates:  [R], what the expert counts
    token:  [R] int64
    each:   how many rows the tokens have, all the same number or [M] int64
    """

    expert: Tensor
    gates: Tensor
    token: Tensor
    each: int | Tensor

    @classmethod
    def of(cls, choice: Choice) -> Rows:
        """The rows of a choice. Only where choices are dropped, the host waits for their number."""
        k = choice.index.shape[1]
        expert, gates = choice.index.flatten(), choice.gates.flatten()
        token = torch.arange(len(expert), device=expert.device) // k
        if choice.kept is None:
            return cls(expert, gates, token, k)
        (place,) = choice.kept.flatten().nonzero(as_tuple=True)
        expert, gates, token = (x.index_select(0, place) for x in (expert, gates, token))
        return cls(expert, gates, token, choice.kept.sum(-1))


def weighed_sum(x: Tensor, rows: Rows, num_tokens: int) -> Tensor:
    """`x` [R, d] -> [M, d]: the sum of each token's rows, times what they count."""
    if isinstance(rows.each, int):
        # In this shape the gradient of the sum is a view, not a copy for each row.
        gates = rows.gates.reshape(num_tokens, rows.each, 1)
        return (x.reshape(num_tokens, rows.each, x.shape[-1]) * gates).sum(1)
    return by_token(x * rows.gates.unsqueeze(-1), rows.each, num_tokens)


def by_token(x: Tensor, each: int | Tensor, num_tokens: int) -> Tensor:
    """`x` [R, d] -> [M, d]: the sum of each token's rows, in their order on any device."""
    if isinstance(each, int):
        return x.reshape(num_tokens, each, x.shape[-1]).sum(1)
    return torch.segment_reduce(x, "sum", lengths=each, unsafe=True, initial=0)


class _Spread(torch.autograd.Function):
    """`x` [M, d] -> [R, d]: each token once for each of its experts, in the order of experts.

    order: [R], which of `rows` stands at each row; inverse: [R], where it went.
    The backward adds up a token's rows in their order, on any device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.each, ctx.num_tokens = rows.each, len(x)
        return x.index_select(0, rows.token.index_select(0, order))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        back = by_token(grad.index_select(0, inverse), ctx.each, ctx.num_tokens)
        return back, None, None, None


class _Observe(torch.autograd.Function):
    """Hands on `out`; in the backward, starts that of the scalar `aux` with 1, and calls `note`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, aux: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note, ctx.aux_like = note, (aux.dtype, aux.device)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.note()
        dtype, device = ctx.aux_like
        return grad, torch.ones((), dtype=dtype, device=device), None


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The layers inside `model` that have experts, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, MoE)}
