"""One optimizer step: noised micro-batches, the step-wide token-weighted loss, clip, update, EMA.

    loss = sum_m lambda_m * sum_tokens weight * mean_channels(error^2) / N_m

N_m counts the tokens of modality m that have a loss in the *whole* step (all ranks, all
micro-batches), and is known before the first backward: so the loss and its gradient do not depend
on how the step is cut into ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinodit.models.diffusion.objective import NoisedBatch, Objective, bin_errors
from kinodit.models.moe.tally import Sums
from kinodit.models.tokens import Role, TokenBatch
from kinodit.trainer import faults
from kinodit.trainer.balance import Balance
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine, Predictions
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.parts import local_part
from kinodit.trainer.parallel.sequence import share

NUM_NOISE_BINS = 10

Gate = Callable[[Tensor, Tensor], bool]
"""(losses, grad_norm), as in `StepResult` -> whether to update. Every rank must say the same."""


@dataclass(frozen=True)
class StepCounts:
    """Counts over all ranks and micro-batches of a step.

    loss_tokens: modality -> N_m, its tokens that have a loss
    num_tokens:  tokens of all modalities
    num_samples: segments
    """

    loss_tokens: Mapping[str, int]
    num_tokens: int
    num_samples: int


@dataclass(frozen=True)
class StepResult:
    """What one step produced, still on the device; sums are over this rank only.

    losses:     [M] this rank's share of each modality's loss, modalities in sorted order
    bin_errors: [M, NUM_NOISE_BINS] sum of token errors by noise level
    bin_counts: [M, NUM_NOISE_BINS] number of those tokens
    grad_norm:  scalar, global, before clipping
    counts:     over all ranks
    updated:    False: the gate refused, and parameters, moments and averages are as before
    loads:      layer with experts -> tally of their use, over all ranks
    """

    losses: Tensor
    bin_errors: Tensor
    bin_counts: Tensor
    grad_norm: Tensor
    counts: StepCounts
    updated: bool = True
    loads: Mapping[str, Sums] = field(default_factory=dict)


def loss_tokens(tokens_weight: Tensor, role: Tensor) -> Tensor:
    """[N] bool: which tokens have a loss."""
    return (role == int(Role.NOISED)) & (tokens_weight > 0)


def count_step(batches: Sequence[TokenBatch], modalities: Sequence[str], mesh: Mesh) -> Tensor:
    """[M + 2] int64 on the device: tokens with a loss by modality, tokens, samples, of all ranks.

    Of this rank's `batches` (on the host). Collective; the host does not wait for it, or for what
    the device is doing, and need not know the sums before the backward.
    """
    ours = [
        sum(
            int(loss_tokens(b.modalities[name].weight, b.modalities[name].role).sum())
            for b in batches
        )
        for name in modalities
    ]
    ours += [sum(b.num_tokens for b in batches), sum(b.num_segments for b in batches)]
    return mesh.sum(mesh.tensor([n * int(mesh.counts) for n in ours], torch.int64))


class Step:
    """The optimizer step of one run."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        emas: Sequence[Ema],
        mesh: Mesh,
        modalities: Sequence[str],
        loss_weights: Mapping[str, float],
        seed: int,
        max_grad_norm: float,
    ) -> None:
        """`modalities` are those with a loss; `loss_weights` their lambda_m (1 if absent)."""
        self._engine = engine
        self._objective = objective
        self._emas = emas
        self._mesh = mesh
        self.modalities = sorted(modalities)
        weights = [loss_weights.get(name, 1.0) for name in self.modalities]
        self._loss_weights = mesh.tensor(weights, torch.float64)
        self._seed = seed
        self._max_grad_norm = max_grad_norm
        self._balance = Balance(engine.model, mesh)

    def __call__(
        self, step: int, batches: Sequence[TokenBatch], lr: float, gate: Gate | None = None
    ) -> StepResult:
        """Update the model with `batches`, this rank's micro-batches of the step, on the host.

        `gate` is asked between the backward and the update.
        """
        self._balance.begin(batches)
        counted = count_step(batches, self.modalities, self._mesh)
        scales = self._loss_weights / counted[: len(self.modalities)].clamp(min=1)
        device = self._engine.device
        shape = (len(self.modalities), NUM_NOISE_BINS, 2)
        bins = torch.zeros(shape, device=device, dtype=torch.float64)
        losses = torch.zeros(len(self.modalities), device=device, dtype=torch.float64)
        for index, batch in enumerate(batches):
            faults.reach("step:micro-batch", step)
            noised = self._objective.corrupt(batch, self._seed)
            noised = share(noised, self._mesh.place).to(device)

            def loss(predictions: Predictions, noised: NoisedBatch = noised) -> Tensor:
                per_token = self._objective.errors(predictions, noised)
                self._bin(per_token, noised.batch, bins)
                terms = self._terms(per_token, noised.batch, scales)
                losses.add_(torch.stack([term.detach().to(losses.dtype) for term in terms]))
                return torch.stack(terms).sum()

            self._engine.forward_backward(noised.batch, loss, last=index == len(batches) - 1)
        loads = self._balance.count(self._engine.gradient_squares)
        faults.reach("step:gradients", step, self._engine.gradient_parts)
        grad_norm = self._engine.clip(self._max_grad_norm)
        faults.reach("step:before-update", step)
        updated = gate is None or gate(losses, grad_norm)
        # The gate has waited for the device: what was counted is there.
        *tokens, num_tokens, num_samples = counted.tolist()
        counts = StepCounts(
            dict(zip(self.modalities, tokens, strict=True)), num_tokens, num_samples
        )
        if updated:
            self._engine.step(lr)
            self._balance.update()
            for ema in self._emas:
                ema.update(step)
        else:
            self._engine.skip()
        faults.reach("step:end", step, self._parameters)
        bin_errors, bin_counts = (bins / self._mesh.place.copies).unbind(-1)
        return StepResult(losses, bin_errors, bin_counts, grad_norm, counts, updated, loads)

    def _parameters(self) -> dict[str, Tensor]:
        """This rank's parts of the parameters."""
        return {name: local_part(p) for name, p in self._engine.masters().items()}

    def _terms(
        self, per_token: Mapping[str, Tensor], batch: TokenBatch, scales: Tensor
    ) -> list[Tensor]:
        """The loss of each modality, its part that comes from `batch`; scales: [M] lambda / N."""
        terms = []
        for row, name in enumerate(self.modalities):
            error = per_token[name]
            weight = batch.modalities[name].weight.to(error.dtype)
            terms.append((error * weight).sum() * scales[row].to(error.dtype))
        return terms

    def _bin(self, per_token: Mapping[str, Tensor], batch: TokenBatch, bins: Tensor) -> None:
        """Add each token's error to the bin of its noise level, without a host sync."""
        for row, name in enumerate(self.modalities):
            part = batch.modalities[name]
            has_loss = loss_tokens(part.weight, part.role)
            error = per_token[name].to(bins.dtype)
            bins[row] += bin_errors(error, batch.level_t[part.level], has_loss, NUM_NOISE_BINS)
