"""Experts put together beforehand, where the noise level alone decides which tokens meet.

When sampling, all noised tokens have the same level: one choice of experts serves all of them at a
step of the sampler, and k experts are one feed-forward with k times the hidden units, whose ways
out are weighed by the gates (MoDE, arXiv 2412.12953, section 3.3). It is made once for each level
of a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.mlp import Activation, activated
from kinodit.models.moe.experts import Experts
from kinodit.models.moe.layer import MoE, moe_layers
from kinodit.models.moe.router import Choice

Choose = Callable[[], Choice]
"""Makes the choice of some token."""


class Fused(nn.Module):
    """The experts of one choice as one feed-forward: up and gate [k h, d], down [d, k h]."""

    def __init__(self, experts: Experts, choice: Choice) -> None:
        """`choice`: of one token; it is every token's."""
        super().__init__()
        index, gates = choice.index[0], choice.gates[0]
        self.activation: Activation = experts.activation

        def stacked(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.detach()[index].flatten(0, 1)

        up = stacked(experts.up)
        assert up is not None
        self.up, self.up_bias = up, stacked(experts.up_bias)
        self.gate, self.gate_bias = stacked(experts.gate), stacked(experts.gate_bias)
        weight = gates.to(experts.down.dtype).view(-1, 1, 1)
        down = experts.down.detach()[index] * weight
        self.down = down.transpose(0, 1).flatten(1)
        self.down_bias: Tensor | None = None
        if experts.down_bias is not None:
            self.down_bias = (experts.down_bias.detach()[index] * weight[:, 0]).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [M, d] -> [M, d]."""
        hidden = F.linear(x, self.up, self.up_bias)
        if self.gate is not None:
            hidden = F.silu(F.linear(x, self.gate, self.gate_bias)) * hidden
        else:
            hidden = activated(hidden, self.activation)
        return F.linear(hidden, self.down, self.down_bias)


@contextmanager
def cached_experts(model: nn.Module) -> Iterator[None]:
    """Inside the context, passes without gradients put the experts of their noise level together.

    Holds those of each layer for the level that was met last.

    Weights must not change meanwhile. Layers whose routers look at tokens, or whose tokens have
    several levels, route as ever. Processes that share tokens or split matrices put their own parts
    together: nothing crosses for it. Those that have experts between them route: the chosen ones
    are elsewhere, and gathering k experts' weights to every process for each level is what dealing
    them out was to avoid.
    """
    layers = [layer for layer in moe_layers(model).values() if layer.router.config.is_by_noise]
    for layer in layers:
        layer.fuse = _Cache(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.fuse = None


class _Cache:
    """The feed-forward of one layer at the noise level that it met last."""

    def __init__(self, layer: MoE) -> None:
        self._layer = layer
        self._made: dict[float, Fused] = {}

    def __call__(self, level_t: Tensor, choose: Choose) -> Fused | None:
        """What tokens of the levels `level_t` [M] meet; None if they differ, or there are none."""
        if len(level_t) == 0 or bool((level_t != level_t[0]).any()):
            return None
        key = level_t[0].item()
        if key not in self._made:
            # Guidance asks for a level twice in turn, and no sampler comes back to one.
            made = partial(Fused, choice=choose())
            nothing = level_t.new_zeros(0)
            self._made = {key: self._layer.experts(nothing, nothing, made)}
        return self._made[key]
