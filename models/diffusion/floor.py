"""The exact target of a training run on Gaussian data: the loss that no network can beat.

On x ~ N(m, s^2) in each dimension, x_t = (1 - t) x + t e and v = e - x are jointly Gaussian, so
that the best velocity is linear in x_t, and its error is the conditional variance of v:
Var(v | x_t) = s^2 / ((1 - t)^2 s^2 + t^2). A loss below it is a leak of the target; a loss well
above it after training is a defect.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kinodit.models.diffusion.timesteps import LevelLaw


def gaussian_floor(t: Tensor | float, std: Tensor | float) -> Tensor:
    """The least squared velocity error per dimension at level t; shapes broadcast. Float64."""
    t = torch.as_tensor(t, dtype=torch.float64)
    variance = torch.as_tensor(std, dtype=torch.float64).square()
    return variance / ((1 - t).square() * variance + t.square())


def gaussian_velocity(x_t: Tensor, t: float, std: float, mean: float = 0.0) -> Tensor:
    """E[v | x_t] on N(mean, std^2): the velocity that attains the floor, in the shape of `x_t`."""
    variance = std**2
    slope = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
    return slope * (x_t - (1 - t) * mean) - mean


def expectation(law: LevelLaw, function: Callable[[Tensor], Tensor], num_tokens: int = 1) -> float:
    """E[function(t)] under a law of levels, for samples of `num_tokens` noised tokens.

    `function` maps levels [n] to values [n]. The uniform draw behind t is written as Phi(z), and
    the integral over z is summed with equal weights, which for smooth integrands that fall off
    with the normal density converges faster than any power of the step.
    """
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    levels = law.levels(torch.special.ndtr(z), [num_tokens] * len(z))
    weight = density / density.sum()
    return float((weight * function(levels)).sum())


def mean_gaussian_floor(law: LevelLaw, std: Tensor | float, num_tokens: int = 1) -> float:
    """The least mean loss on N(m, std^2) data; deviations of shape [D] average over dimensions.

    (pi / 2) s for uniform t without shift; 1.7413 for logit-normal(0, 1) at s = 1.
    """
    stds = torch.as_tensor(std, dtype=torch.float64).reshape(-1)

    def floor(t: Tensor) -> Tensor:
        return gaussian_floor(t.unsqueeze(-1), stds).mean(-1)

    return expectation(law, floor, num_tokens)
