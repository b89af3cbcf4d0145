"""A network and a batch as the velocity field that a sampler integrates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from kinodit.models.diffusion.draws import noised_rows
from kinodit.models.diffusion.objective import NoisedBatch, Objective, at_level
from kinodit.models.diffusion.samplers import VelocityFn
from kinodit.models.tokens import Role, TokenBatch

Network = Callable[[TokenBatch], Mapping[str, Tensor]]


def velocity_field(network: Network, objective: Objective, batch: TokenBatch) -> VelocityFn:
    """The velocity of the batch's noised tokens; zero for clean ones, which so stay as they are.

    The field takes latents [N, C] of the modalities that are sampled and puts them in the place of
    the batch's; all other facts (captions, positions, clean rows of levels) are the batch's own.
    """
    rows_K = noised_rows(batch)
    noised_N1 = {
        name: (tokens.role == Role.NOISED).unsqueeze(-1)
        for name, tokens in batch.modalities.items()
    }

    def velocity(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        seen = NoisedBatch(batch=at_level(batch.with_latents(x), t, rows_K), clean={}, noise={})
        predictions = network(seen.batch)
        return {
            name: objective.velocity(predictions[name], seen, name).where(noised_N1[name], 0.0)
            for name in x
        }

    return velocity
