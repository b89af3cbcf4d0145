"""A network and a batch as the velocity field that a sampler integrates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kinodit.models.diffusion.draws import noised_rows
from kinodit.models.diffusion.objective import NoisedBatch, Objective, at_level
from kinodit.models.diffusion.samplers import VelocityFn
from kinodit.models.tokens import Role, TokenBatch

Network = Callable[[TokenBatch], Mapping[str, Tensor]]


def velocity_field(network: Network, objective: Objective, batch: TokenBatch) -> VelocityFn:
    """The velocity of the batch's noised tokens; zero for clean ones, which so stay as they are.

    The field takes latents [N, C] of the modalities that are sampled and puts those of noised
    tokens in the place of the batch's; all other facts (captions, positions, clean rows of levels)
    are the batch's own. A modality that the batch lacks has velocity 0.
    """
    rows_K = noised_rows(batch)
    noised_N1 = {
        name: (tokens.role == Role.NOISED).unsqueeze(-1)
        for name, tokens in batch.modalities.items()
    }

    def velocity(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        own = {name: part for name, part in x.items() if batch.modalities[name].num_tokens}
        latents = {
            name: part.where(noised_N1[name], batch.modalities[name].latents.to(part.dtype))
            for name, part in own.items()
        }
        noised = at_level(batch.with_latents(latents), t, rows_K)
        seen = NoisedBatch(batch=noised, clean={}, noise={})
        predictions = network(seen.batch)
        found = {
            name: objective.velocity(predictions[name], seen, name).where(noised_N1[name], 0.0)
            for name in own
        }
        return {name: found.get(name, torch.zeros_like(part)) for name, part in x.items()}

    return velocity
