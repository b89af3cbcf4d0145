"""On Gaussian data the loss of training reaches the least possible one, and no lower.

A loss below the analytic floor means that the target leaks into the input; one that stays above
it means that levels, noise, target or the meaning of the prediction do not belong together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.diffusion.floor import mean_gaussian_floor
from kinodit.models.diffusion.objective import (
    NoisedBatch,
    Objective,
    RectifiedFlowConfig,
    build_objective,
)
from kinodit.models.diffusion.timesteps import (
    FixedShift,
    LevelLaw,
    LogitNormalTimesteps,
    TimestepsConfig,
    UniformTimesteps,
)
from kinodit.models.random import generator, normal
from kinodit.models.tokens import (
    AttentionLayout,
    ModalityTokens,
    Role,
    SampleKey,
    TokenBatch,
)

SEED = 3
SAMPLES, TOKENS, CHANNELS = 96, 32, 8
STEPS = 900
VALIDATION_PACKS = 500


def gaussian_pack(step: int, std: float) -> TokenBatch:
    """SAMPLES samples of TOKENS tokens of N(0, std^2), each with a level of its own."""
    segment = torch.repeat_interleave(torch.arange(SAMPLES), TOKENS)
    count = SAMPLES * TOKENS
    tokens = ModalityTokens(
        latents=std * normal(generator(SEED, "data", step), (count, CHANNELS)),
        segment=segment,
        group=torch.zeros(count, dtype=torch.int64),
        position=torch.zeros(count, 3),
        role=torch.full((count,), int(Role.NOISED), dtype=torch.int8),
        level=segment,
        weight=torch.ones(count),
    )
    return TokenBatch(
        modalities={"video": tokens},
        level_segment=torch.arange(SAMPLES),
        level_t=torch.zeros(SAMPLES),
        conditions={},
        layout=AttentionLayout(None, None, (), (), ()),
        samples=tuple(SampleKey(step, slot, f"gauss:{slot}") for slot in range(SAMPLES)),
    )


class Network(nn.Module):
    """Two layers modulated by the noise level; sees no more than a noised token and its t."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, width)
        self.time = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 2 * width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, CHANNELS)
        self.direct = nn.Linear(width, CHANNELS)

    def forward(self, noised: NoisedBatch) -> Tensor:
        t_K1 = noised.batch.level_t.unsqueeze(-1)
        angles = math.pi * t_K1 * 2.0 ** torch.arange(-3, 5)
        features = torch.cat([t_K1, angles.sin(), angles.cos()], dim=-1)
        tokens = noised.batch.modalities["video"]
        scale, shift = self.time(features)[tokens.level].chunk(2, dim=-1)
        x = self.embed(tokens.latents)
        bent = self.hidden(nn.functional.silu(x + shift))
        output: Tensor = self.direct(x * (1 + scale)) + 0.1 * self.out(nn.functional.silu(bent))
        return output


def validation_errors(network: Network, objective: Objective, std: float) -> Iterator[Tensor]:
    """The mean error of each sample, pack by pack, on draws that training never saw."""
    with torch.no_grad():
        for index in range(VALIDATION_PACKS):
            noised = objective.corrupt(gaussian_pack(1_000_000 + index, std), SEED)
            errors = objective.errors({"video": network(noised)}, noised)["video"]
            yield errors.reshape(SAMPLES, TOKENS).double().mean(1)


@pytest.mark.learning
@pytest.mark.parametrize(
    ("prediction", "timesteps", "shift", "std"),
    [
        ("velocity", UniformTimesteps(), 1.0, 1.0),
        ("x0", UniformTimesteps(), 1.0, 1.0),
        ("velocity", LogitNormalTimesteps(), 1.0, 1.0),
        ("x0", LogitNormalTimesteps(), 3.0, 0.5),
    ],
    ids=["velocity-uniform", "x0-uniform", "velocity-logit_normal", "x0-logit_normal-shifted"],
)
def test_the_loss_reaches_the_analytic_floor_and_never_goes_below(
    prediction: str, timesteps: TimestepsConfig, shift: float, std: float
) -> None:
    config = RectifiedFlowConfig(
        prediction=prediction,  # type: ignore[arg-type]
        timesteps=timesteps,
        shift=FixedShift(value=shift),
    )
    objective = build_objective(config)
    torch.manual_seed(SEED)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 20) * (1 - step / STEPS) ** 1.5
    )
    for step in range(STEPS):
        noised = objective.corrupt(gaussian_pack(step, std), SEED)
        loss = objective.errors({"video": network(noised)}, noised)["video"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    per_sample = torch.cat(list(validation_errors(network, objective, std)))
    mean = float(per_sample.mean())
    stderr = float(per_sample.std()) / math.sqrt(len(per_sample))
    floor = mean_gaussian_floor(LevelLaw(timesteps, FixedShift(value=shift)), std)
    print(
        f"{timesteps.name}, shift {shift:g}, s = {std:g}, {prediction}: "
        f"loss {mean:.4f} +- {stderr:.4f}, floor {floor:.4f}, "
        f"excess {100 * (mean / floor - 1):+.2f} % +- {100 * stderr / floor:.2f} %"
    )
    assert stderr <= 1.2e-3 * floor
    assert mean >= floor - 4 * stderr
    assert mean <= 1.01 * floor
