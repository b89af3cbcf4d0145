"""On Gaussian data the loss of training reaches the least possible one, and no lower.

A loss below the analytic floor means that the target leaks into the input; one that stays above
it means that levels, noise, target or the meaning of the prediction do not belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.diffusion.floor import gaussian_floor, mean_gaussian_floor
from kinodit.models.diffusion.objective import (
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
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT, MMDiTConfig, StreamConfig
from kinodit.models.random import generator, normal
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout
from tests.support.evidence import write_evidence

SEED = 3
CHANNELS = 8
VALIDATION_SAMPLES = 34_560


@dataclass(frozen=True)
class Size:
    """Samples of a pack, tokens of a sample, steps of training."""

    samples: int
    tokens: int
    steps: int


def gaussian_pack(step: int, std: float, size: Size) -> TokenBatch:
    """Tokens of N(0, std^2), each sample with a level of its own."""
    segment = torch.repeat_interleave(torch.arange(size.samples), size.tokens)
    count = size.samples * size.tokens
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
        level_segment=torch.arange(size.samples),
        level_t=torch.zeros(size.samples),
        conditions={},
        layout=build_layout([tokens]),
        samples=tuple(SampleKey(step, slot, f"gauss:{slot}") for slot in range(size.samples)),
    )


class Pointwise(nn.Module):
    """Two layers modulated by the noise level; sees no more than a noised token and its t."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, width)
        self.time = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 2 * width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, CHANNELS)
        self.direct = nn.Linear(width, CHANNELS)

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        t_K1 = batch.level_t.unsqueeze(-1)
        angles = math.pi * t_K1 * 2.0 ** torch.arange(-3, 5)
        features = torch.cat([t_K1, angles.sin(), angles.cos()], dim=-1)
        tokens = batch.modalities["video"]
        scale, shift = self.time(features)[tokens.level].chunk(2, dim=-1)
        x = self.embed(tokens.latents)
        bent = self.hidden(nn.functional.silu(x + shift))
        output: Tensor = self.direct(x * (1 + scale)) + 0.1 * self.out(nn.functional.silu(bent))
        return {"video": output}


def pointwise() -> nn.Module:
    torch.manual_seed(SEED)
    return Pointwise()


def transformer() -> nn.Module:
    config = MMDiTConfig(
        streams={"video": StreamConfig(in_channels=CHANNELS)},
        width=64,
        num_heads=2,
        num_double_blocks=2,
    )
    model = MMDiT(config)
    initialize(model, SEED)
    return model


def validation(
    network: nn.Module, objective: Objective, std: float, size: Size
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean error and level of each sample, pack by pack, on draws that training never saw."""
    with torch.no_grad():
        for index in range(VALIDATION_SAMPLES // size.samples):
            pack = gaussian_pack(1_000_000 + index, std, size)
            noised = objective.corrupt(pack, SEED)
            errors = objective.errors(network(noised.batch), noised)["video"]
            per_sample = errors.reshape(size.samples, size.tokens).double().mean(1)
            yield per_sample, noised.batch.level_t


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[list[dict[str, object]]]:
    """One row of each run; kept when all of them passed."""
    rows: list[dict[str, object]] = []
    yield rows
    if request.config.getoption("--size") == "full" and request.session.testsfailed == 0:
        command = "pytest -m learning --size full tests/learning/test_floor.py"
        write_evidence("floor", "tests/learning/test_floor.py", {"command": command, "runs": rows})


@pytest.mark.learning
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("build", "size", "learning_rate", "prediction", "timesteps", "shift", "std"),
    [
        (pointwise, Size(96, 32, 900), 1e-2, "velocity", UniformTimesteps(), 1.0, 1.0),
        (pointwise, Size(96, 32, 900), 1e-2, "x0", UniformTimesteps(), 1.0, 1.0),
        (pointwise, Size(96, 32, 900), 1e-2, "x0", LogitNormalTimesteps(), 3.0, 0.5),
        (transformer, Size(192, 8, 600), 5e-3, "velocity", LogitNormalTimesteps(), 1.0, 1.0),
    ],
    ids=["velocity-uniform", "x0-uniform", "x0-logit_normal-shifted", "mmdit-logit_normal"],
)
def test_the_loss_reaches_the_analytic_floor_and_never_goes_below(
    build: Callable[[], nn.Module],
    size: Size,
    learning_rate: float,
    prediction: Literal["velocity", "x0"],
    timesteps: TimestepsConfig,
    shift: float,
    std: float,
    figures: list[dict[str, object]],
) -> None:
    objective = build_objective(
        RectifiedFlowConfig(
            prediction=prediction, timesteps=timesteps, shift=FixedShift(value=shift)
        )
    )
    network = build()
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 20) * (1 - step / size.steps) ** 1.5
    )
    for step in range(size.steps):
        noised = objective.corrupt(gaussian_pack(step, std, size), SEED)
        loss = objective.errors(network(noised.batch), noised)["video"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    rows = list(validation(network, objective, std, size))
    error = torch.cat([per_sample for per_sample, _ in rows])
    floor_at_t = gaussian_floor(torch.cat([t for _, t in rows]), std)
    floor = mean_gaussian_floor(LevelLaw(timesteps, FixedShift(value=shift)), std)
    # The drawn levels follow the law ...
    assert float(floor_at_t.mean()) == pytest.approx(floor, abs=4 * standard_error(floor_at_t))
    # ... and with the known share of their spread taken out, the loss is known to 0.1 %.
    excess = error - floor_at_t
    mean, stderr = floor + float(excess.mean()), standard_error(excess)
    row = {
        "model": build.__name__,
        "prediction": prediction,
        "timesteps": timesteps.name,
        "shift": shift,
        "std": std,
        "floor": floor,
        "loss": mean,
        "standard_error": stderr,
        "excess_percent": 100 * (mean / floor - 1),
        "samples": len(error),
    }
    figures.append(row)
    print(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    assert stderr <= 1e-3 * floor
    assert mean >= floor - 4 * stderr
    assert mean <= 1.01 * floor
