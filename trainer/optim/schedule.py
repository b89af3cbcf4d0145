"""Learning-rate schedules as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a factor of optim.lr.

    Linear warm-up over `warmup_steps`; then constant, cosine or linear to `final_factor` at the
    last step, or wsd: constant, then linear over the last `decay_steps` (Hu et al., arXiv
    2404.06395, section 4).
    """

    name: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}: "
                "must not be negative"
            )

    def factor(self, step: int, num_steps: int) -> float:
        """Factor for step `step` (0-based) of `num_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        start = num_steps - self.decay_steps if self.name == "wsd" else self.warmup_steps
        if step < start:
            return 1.0
        progress = min(1.0, (step - start) / max(1, num_steps - 1 - start))
        if self.name == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1.0 + (self.final_factor - 1.0) * progress
