"""Samplers: from noise at t = 1 to data at t = 0, along the velocity.

Pure functions of one signature over named tensors (modalities of any shape), without randomness
and without a host sync. The time grid stays on the host in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from kinodit.models.diffusion import path
from kinodit.models.diffusion.timesteps import shift as shifted
from kinodit.models.errors import ConfigError

VelocityFn = Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]]
"""`velocity(x, t)`: the velocity of every tensor of `x` at noise level t, in their shapes."""

Method = Literal["euler", "heun", "dpmpp_2m"]


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn.

    method: "dpmpp_2m" is DPM-Solver++(2M): one evaluation a step, of second order
    steps: number of intervals of the time grid; Heun evaluates the velocity twice in each
    shift: by how much the grid crowds towards noise; None takes the shift of training
    """

    method: Method = "euler"
    steps: int = 40
    shift: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sampling needs at least one step, got steps={self.steps}")
        if self.shift is not None and not self.shift > 0:
            raise ConfigError(f"a sampling shift must be above 0, got {self.shift}")


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Levels from 1 to 0, [steps + 1] float64, equal intervals before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def sample(
    velocity_fn: VelocityFn, x: Mapping[str, Tensor], times: Tensor, method: Method = "euler"
) -> dict[str, Tensor]:
    """Integrate dx/dt = v from `times[0]` to `times[-1]`.

    x:     tensors at `times[0]`, of any shape
    times: [steps + 1], monotonic, on the host (`time_grid`)

    Returns tensors of the shapes and dtypes of `x`; the state between steps is at least float32.
    Heun's last step into t = 0 is an Euler step: training hardly visits t = 0 (Karras et al.,
    "Elucidating the design space of diffusion-based generative models", NeurIPS 2022,
    algorithm 1, does the same); so is DPM-Solver++'s. Raises ValueError for an unknown method.
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown sampler {method!r}; there are {', '.join(get_args(Method))}")
    grid: list[float] = times.tolist()
    state = {
        name: part.to(torch.promote_types(part.dtype, torch.float32)) for name, part in x.items()
    }

    def evaluate(at: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        return velocity_fn({name: part.to(x[name].dtype) for name, part in at.items()}, t)

    before: Mapping[str, Tensor] = {}
    for index, (t, t_next) in enumerate(pairwise(grid)):
        slope = evaluate(state, t)
        ahead = advance(state, slope, t_next - t)
        if method == "dpmpp_2m":
            data = {
                n: path.x0_from_velocity(state[n], slope[n].to(state[n].dtype), t) for n in state
            }
            share = second_order_share(grid[index - 1] if index else 1.0, t, t_next)
            if share:
                ahead = {n: ahead[n] + share * (data[n] - before[n]) for n in ahead}
            before = data
        if method == "heun" and t_next != 0:
            slope_ahead = evaluate(ahead, t_next)
            mean = {name: (slope[name] + slope_ahead[name]) / 2 for name in state}
            ahead = advance(state, mean, t_next - t)
        state = ahead
    return {name: part.to(x[name].dtype) for name, part in state.items()}


def second_order_share(t_before: float, t: float, t_next: float) -> float:
    """How much of the change of predicted data a step of DPM-Solver++(2M) adds to an Euler step.

    Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2, with alpha = 1 - t and sigma = t: its
    step from predicted data D is the Euler step plus (alpha' - alpha sigma' / sigma) (D - x0), and
    D - x0 = h / (2 h_before) times the change of x0, where h is a step of lambda = ln(alpha /
    sigma). 0 where a step of lambda is infinite: the first from noise, the one after it, the last.
    """
    if not all(0 < level < 1 for level in (t_before, t, t_next)):
        return 0.0
    lambdas = [math.log((1 - level) / level) for level in (t_before, t, t_next)]
    ratio = (lambdas[2] - lambdas[1]) / (lambdas[1] - lambdas[0])
    return ((1 - t_next) - (1 - t) * t_next / t) * ratio / 2


def advance(
    x: Mapping[str, Tensor], velocity: Mapping[str, Tensor], dt: float
) -> dict[str, Tensor]:
    """x + dt v for every tensor, in the dtypes and shapes of `x`."""
    return {name: part + dt * velocity[name].to(part.dtype) for name, part in x.items()}
