"""Laws of the noise level t, as pure functions of one uniform number each.

A law is its quantile function: u uniform in [0, 1) gives a level with that law. The shift moves a
law (and the grid of a sampler) towards noise when a sample has more tokens, since many tokens of
one picture average the noise away. Convention: t = 1 is noise. All maths in the dtype of its
input; callers pass float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.errors import ConfigError

# Beyond these scales the mode law's quantile function is no longer monotonic (Esser et al.).
MODE_SCALE_RANGE = (-1.0, 2.0 / (math.pi - 2.0))


@dataclass(frozen=True, kw_only=True)
class TimestepsConfig(ABC):
    """The law of the noise level in training."""

    name: str

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Levels in [0, 1] of the shape and dtype of `u` (in [0, 1])."""


@dataclass(frozen=True, kw_only=True)
class UniformTimesteps(TimestepsConfig):
    """t uniform in [0, 1)."""

    name: Literal["uniform"] = "uniform"

    def quantile(self, u: Tensor) -> Tensor:
        """t = u, elementwise."""
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimesteps(TimestepsConfig):
    """t = sigmoid(mean + std z), z standard normal (arXiv 2403.03206, section 3.1)."""

    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.std > 0 and math.isfinite(self.std)):
            raise ConfigError(
                f"logit_normal timesteps need a finite mean and a std above 0, "
                f"got mean={self.mean}, std={self.std}"
            )

    def quantile(self, u: Tensor) -> Tensor:
        """t = sigmoid(mean + std Phi^-1(u)), elementwise."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True, kw_only=True)
class ModeTimesteps(TimestepsConfig):
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) (arXiv 2403.03206, equation 20).

    A positive scale prefers the middle, a negative one the ends; 1.29 is the paper's best.
    """

    name: Literal["mode"] = "mode"
    scale: float = 1.29

    def __post_init__(self) -> None:
        low, high = MODE_SCALE_RANGE
        if not low <= self.scale <= high:
            raise ConfigError(
                f"mode timesteps need a scale in [{low}, {high:.4f}], got scale={self.scale}"
            )

    def quantile(self, u: Tensor) -> Tensor:
        """The formula above, elementwise; it falls in u, which leaves the law the same."""
        t = 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return t.clamp(0, 1)


TIMESTEPS: dict[str, type[TimestepsConfig]] = {
    "uniform": UniformTimesteps,
    "logit_normal": LogitNormalTimesteps,
    "mode": ModeTimesteps,
}


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(ABC):
    """By how much levels move towards noise, given the number of tokens of a sample."""

    name: str

    @abstractmethod
    def factor(self, num_tokens: int) -> float:
        """The shift a of a sample that has `num_tokens` noised tokens."""


@dataclass(frozen=True, kw_only=True)
class FixedShift(ShiftConfig):
    """The same shift for every sample; 1 leaves levels as they are, 3 is SD3's at 1024 px."""

    name: Literal["fixed"] = "fixed"
    value: float = 1.0

    def __post_init__(self) -> None:
        if not (self.value > 0 and math.isfinite(self.value)):
            raise ConfigError(f"a fixed shift must be above 0, got value={self.value}")

    def factor(self, num_tokens: int) -> float:
        """`value`, whatever the number of tokens."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class TokenShift(ShiftConfig):
    """a = sqrt(m / n), m tokens of the sample against n (arXiv 2403.03206, equation 23).

    All noised tokens of a sample count, over frames as well as over the picture.
    """

    name: Literal["tokens"] = "tokens"
    reference_tokens: int = 256

    def __post_init__(self) -> None:
        if self.reference_tokens < 1:
            raise ConfigError(
                f"a shift by tokens needs reference_tokens of at least 1, "
                f"got {self.reference_tokens}"
            )

    def factor(self, num_tokens: int) -> float:
        """sqrt(num_tokens / reference_tokens); a sample without tokens counts as one token."""
        return math.sqrt(max(num_tokens, 1) / self.reference_tokens)


SHIFTS: dict[str, type[ShiftConfig]] = {"fixed": FixedShift, "tokens": TokenShift}


def shift(t: Tensor, factor: Tensor | float) -> Tensor:
    """a t / (1 + (a - 1) t), elementwise: logit(t) + ln a (arXiv 2403.03206, equation 23)."""
    return factor * t / (1 + (factor - 1) * t)


def default_timesteps() -> TimestepsConfig:
    """Logit-normal(0, 1), SD3's choice."""
    return LogitNormalTimesteps()


def default_shift() -> ShiftConfig:
    """No shift."""
    return FixedShift()


@dataclass(frozen=True)
class LevelLaw:
    """A law of levels with its shift: all that decides t of a sample, but for the draw."""

    timesteps: TimestepsConfig = field(default_factory=default_timesteps)
    shift: ShiftConfig = field(default_factory=default_shift)

    def levels(self, u_K: Tensor, num_tokens_K: list[int]) -> Tensor:
        """Levels [K], float64, from uniform numbers and the token counts of their samples."""
        factors = [self.shift.factor(count) for count in num_tokens_K]
        return shift(
            self.timesteps.quantile(u_K.to(torch.float64)),
            torch.tensor(factors, dtype=torch.float64),
        )
