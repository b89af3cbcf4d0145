"""Balance of experts: what a step tells their layers beforehand, and learns from them afterwards.

Auxiliary losses are means over the tokens of the whole step, so they need its number of tokens
before the first backward; corrections move by the counts of the whole step, after the update. Both
are the same however tokens are dealt out to packs, micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kinodit.models.moe.layer import MoE, moe_layers
from kinodit.models.moe.prior import matched_units, solver
from kinodit.models.moe.tally import Load, Sums
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.parallel.mesh import Mesh

Squares = Callable[[Sequence[str]], Tensor]
"""[n], as `Engine.gradient_squares`."""


class Balance:
    """The layers of a model that have experts. A model without any costs nothing."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self._layers = moe_layers(model)
        self._matching = Matching(self._layers, mesh)
        self._routers = [
            [f"{name}.router.{key}" for key, _ in layer.router.named_parameters()]
            for name, layer in self._layers.items()
        ]
        self._mesh = mesh
        self._sums: list[Tensor] = []

    def begin(self, batches: Sequence[TokenBatch]) -> None:
        """Before the first forward of a step of these packs of this rank. Collective.

        The balance loss is E times a mean over tokens: Fedus et al., arXiv 2101.03961, equation 4.
        """
        if not self._layers:
            return
        self._matching.begin()
        names = sorted(batches[0].modalities)
        ours = [sum(batch.modalities[name].num_tokens for batch in batches) for name in names]
        counted = [float(n) * self._mesh.counts for n in (*ours, sum(ours))]
        sums = self._mesh.sum(self._mesh.tensor(counted, torch.float64)).clamp(min=1)
        for name, layer in self._layers.items():
            router, stream = layer.config.router, _stream(name)
            # Each of the ranks that have the same tokens adds its fraction.
            tokens = sums[names.index(stream) if stream else -1] * self._mesh.place.copies
            factor = {"loss": layer.config.num_experts, "prior": 1}.get(router.balance, 0)
            layer.loss_scale = router.loss_weight * factor / tokens
            layer.z_scale = router.z_weight / tokens
            layer.tally.take(self._mesh.device)

    def count(self, squares: Squares) -> dict[str, Sums]:
        """After the last backward: layer -> its tally of the step, of all ranks. Collective.

        And the square of the norm of its router's gradient, by its parameters' `squares`.

        On the device, for which the host does not wait.
        """
        if not self._layers:
            return {}
        device = self._mesh.device
        # Ranks that have the same tokens count them all.
        copies = self._mesh.place.copies
        parts = [layer.tally.take(device) / copies for layer in self._layers.values()]
        if routers := [name for names in self._routers for name in names]:
            found = squares(routers).split([len(names) for names in self._routers])
            for part, gradients in zip(parts, found, strict=True):
                part[-1] = gradients.sum()
        flat = self._mesh.sum(torch.cat(parts))
        self._matching.gather()
        self._sums = list(flat.split([layer.tally.size for layer in self._layers.values()]))
        return {
            name: Sums(sums, layer.tally.streams)
            for (name, layer), sums in zip(self._layers.items(), self._sums, strict=True)
        }

    @torch.no_grad()
    def update(self) -> None:
        """After the update of the parameters: move corrections, and keep the step's load."""
        for layer, sums in zip(self._layers.values(), self._sums, strict=True):
            if layer.router.config.is_learned:
                _update(layer, sums)
        self._matching.update()


class Matching:
    """Which unit of the diffusion prior each expert has, in the layers of a stream together.

    Found anew after each step, from what its routers made of the prior's tasks: on the main rank,
    so that all have the same. The host waits for it.
    """

    def __init__(self, layers: Mapping[str, MoE], mesh: Mesh) -> None:
        """Before anything is trained.

        Raises:
            MissingExtraError: the library that finds it is not installed.
        """
        self._pools: dict[str, list[MoE]] = {}
        for name, layer in layers.items():
            if layer.router.config.balance == "prior":
                self._pools.setdefault(_stream(name), []).append(layer)
        for pool in self._pools.values():
            for layer in pool:
                layer.depth = len(pool)
        if self._pools:
            solver()
        self._mesh = mesh
        self._masks: list[Tensor] = []
        self._has_begun = False

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step: at the start of training, experts have the units in their order."""
        if self._has_begun:
            return
        self._has_begun = True
        for pool in self._pools.values():
            if not any(layer.router.unit.round().any() for layer in pool):
                units = torch.arange(sum(layer.config.num_experts for layer in pool))
                _assign(pool, units)

    def gather(self) -> None:
        """After the last backward: what the main rank's routers made of the tasks. Collective."""
        self._masks = []
        for pool in self._pools.values():
            found = [layer.router.masks for layer in pool]
            masks = torch.cat([mask.t() for mask in found if mask is not None])
            self._masks.append(self._mesh.sum(masks if self._mesh.is_main else masks * 0))

    def update(self) -> None:
        """After the update of the parameters."""
        for pool, masks in zip(self._pools.values(), self._masks, strict=True):
            width = sum(layer.config.top_k for layer in pool)
            _assign(pool, torch.from_numpy(matched_units(masks.cpu().numpy(), width)))


@torch.no_grad()
def _assign(pool: Sequence[MoE], units: Tensor) -> None:
    parts = units.split([layer.config.num_experts for layer in pool])
    for layer, part in zip(pool, parts, strict=True):
        layer.router.unit.copy_(part)


def _stream(layer: str) -> str:
    """The stream of a layer's tokens by the layer's name; "" for blocks that see all streams."""
    parts = layer.split(".")
    return parts[parts.index("streams") + 1] if "streams" in parts else ""


def _update(layer: MoE, sums: Tensor) -> None:
    """Algorithm 1 of Wang et al., arXiv 2408.15664: towards experts with less than the mean."""
    router = layer.router
    counts = layer.tally.by_expert(sums)
    if router.config.balance == "bias":
        moves = router.config.bias_rate * torch.sign(counts.mean() - counts)
        router.correction.add_(moves.to(router.correction.dtype))
    router.load.copy_(counts / counts.sum().clamp(min=1))


def report(tallies: Mapping[str, Sums], num_steps: int) -> dict[str, object]:
    """What a row of metrics says of the experts. `tallies`: layer -> sums over `num_steps` steps.

    moe/violation: the largest load over the mean, less 1, of the worst layer (MaxVio of arXiv
                   2408.15664, equation 4)
    moe/entropy:   of the tokens' shares, over that of equal shares, mean over layers
    moe/dropped:   share of the tokens that went to no expert of a layer, mean over layers
    moe/router_grad_norm: of all routers together, root mean square over the steps
    experts:       layer -> "load", of each expert over the mean; "noise_bins", the same by bin of
                   the noise level; "modalities", the same by stream, if there are several;
                   "violation"; "z", mean squared log-sum-exp of the logits; "dropped";
                   "experts_per_token", how many a token went to, on average; "router_grad_norm"
    """
    if not tallies:
        return {}
    loads = {name: Load.of(sums.values.tolist(), sums.streams) for name, sums in tallies.items()}
    layers: dict[str, dict[str, object]] = {}
    entropies, dropped = [], []
    for name, load in loads.items():
        num_experts = len(load.shares)
        num_tokens = max(1.0, load.num_tokens)
        entropies.append(load.entropy / num_tokens / math.log(max(2, num_experts)))
        dropped.append(load.dropped / num_tokens)
        layers[name] = {
            "load": _over_mean(load.by_expert) or [0.0] * num_experts,
            "noise_bins": [_over_mean(row) for row in load.by_bin],
            "violation": round(load.violation, 6),
            "z": load.squares / num_tokens,
            "dropped": round(dropped[-1], 6),
            "experts_per_token": round(sum(load.by_expert) / num_tokens, 4),
            "router_grad_norm": math.sqrt(load.gradient / num_steps),
        }
        if len(load.streams) > 1:
            by_stream = {stream: _over_mean(row) for stream, row in load.by_stream.items()}
            layers[name] |= {"modalities": by_stream}
    return {
        "moe/violation": max(load.violation for load in loads.values()),
        "moe/entropy": sum(entropies) / len(entropies),
        "moe/dropped": sum(dropped) / len(dropped),
        "moe/router_grad_norm": math.sqrt(sum(one.gradient for one in loads.values()) / num_steps),
        "experts": layers,
    }


def _over_mean(counts: Sequence[float]) -> list[float]:
    """[E] -> [E]; empty if nothing was counted."""
    total = sum(counts)
    return [round(count * len(counts) / total, 4) for count in counts] if total else []
