from __future__ import annotations

import math

import pytest
import torch

from kinodit.models.diffusion.floor import (
    expectation,
    gaussian_floor,
    gaussian_velocity,
    mean_gaussian_floor,
)
from kinodit.models.diffusion.timesteps import (
    FixedShift,
    LevelLaw,
    LogitNormalTimesteps,
    ModeTimesteps,
    TimestepsConfig,
    TokenShift,
    UniformTimesteps,
)
from kinodit.models.random import generator, normal


def law(timesteps: TimestepsConfig, shift: float = 1.0) -> LevelLaw:
    return LevelLaw(timesteps, FixedShift(value=shift))


@pytest.mark.parametrize("std", [0.02, 0.5, 1.0, 3.0])
def test_uniform_levels_have_half_pi_times_the_deviation(std: float) -> None:
    assert mean_gaussian_floor(law(UniformTimesteps()), std) == pytest.approx(
        math.pi / 2 * std, rel=1e-12
    )


def test_logit_normal_levels() -> None:
    assert mean_gaussian_floor(law(LogitNormalTimesteps()), 1.0) == pytest.approx(1.7413, abs=5e-5)


@pytest.mark.parametrize(
    "timesteps",
    [UniformTimesteps(), LogitNormalTimesteps(mean=0.3, std=1.2), ModeTimesteps()],
    ids=repr,
)
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_integrals_agree_with_plain_sums_over_draws(
    timesteps: TimestepsConfig, shift: float
) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    levels = law(timesteps, shift).levels(u, [1] * len(u))
    for std in (0.4, 1.0):
        expected = float(gaussian_floor(levels, std).mean())
        assert mean_gaussian_floor(law(timesteps, shift), std) == pytest.approx(expected, rel=1e-6)
    assert expectation(law(timesteps, shift), lambda t: t) == pytest.approx(
        float(levels.mean()), rel=1e-6
    )


def test_the_shift_by_tokens_enters_the_floor() -> None:
    by_tokens = LevelLaw(UniformTimesteps(), TokenShift(reference_tokens=4))
    assert mean_gaussian_floor(by_tokens, 1.0, num_tokens=36) == pytest.approx(
        mean_gaussian_floor(law(UniformTimesteps(), 3.0), 1.0)
    )


def test_several_deviations_average() -> None:
    stds = torch.tensor([0.5, 2.0])
    each = [mean_gaussian_floor(law(LogitNormalTimesteps()), float(std)) for std in stds]
    both = mean_gaussian_floor(law(LogitNormalTimesteps()), stds)
    assert both == pytest.approx(sum(each) / 2)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_the_best_velocity_has_the_floor_s_error_and_no_slope_beats_it(t: float) -> None:
    std, mean = 0.6, 1.2
    draws = normal(generator("floor"), (2, 400_000)).double()
    x, e = mean + std * draws[0], draws[1]
    x_t, v = (1 - t) * x + t * e, e - x
    best = gaussian_velocity(x_t, t, std, mean)
    error = (best - v).square()
    stderr = float(error.std()) / math.sqrt(len(error))
    floor = float(gaussian_floor(t, std))
    assert float(error.mean()) == pytest.approx(floor, abs=4 * stderr)
    for factor in (0.9, 1.1):
        centred = best + mean
        assert float((factor * centred - mean - v).square().mean()) > floor
