"""A long sample as overlapping windows, each of a length that the network was trained on.

In every step each window has its own velocity, under its own conditions, and where windows overlap
the mean is taken (MultiDiffusion, Bar-Tal et al., arXiv 2302.08113, equations 3 to 5, over time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinodit.models.diffusion.samplers import VelocityFn
from kinodit.models.errors import ConfigError

Rows = Mapping[str, slice]
"""stream -> which of its tokens [N, C] a window has."""


@dataclass(frozen=True)
class WindowConfig:
    """Windows over time.

    length_s:  seconds of a window; 0: the whole clip is one
    overlap_s: seconds that a window has in common with the one before, at least
    """

    length_s: float = 0.0
    overlap_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_s < (self.length_s or float("inf")):
            raise ConfigError(
                f"sample.window: overlap_s = {self.overlap_s} must be less than length_s = "
                f"{self.length_s}, and neither negative"
            )

    def starts_s(self, total_s: float) -> list[float]:
        """Where windows begin: as few as cover `total_s`, evenly spread; [0.0] if one does."""
        if not self.length_s or total_s <= self.length_s:
            return [0.0]
        step_s = self.length_s - self.overlap_s
        count = 1 + -int(-(total_s - self.length_s) // step_s)
        last_s = total_s - self.length_s
        return [last_s * index / (count - 1) for index in range(count)]


def windowed(velocities: Sequence[VelocityFn], windows: Sequence[Rows]) -> VelocityFn:
    """The mean of the windows' velocities; of one window its velocity itself.

    Every token must be in a window, which is given its own tokens alone.
    """
    if len(velocities) == 1:
        return velocities[0]

    def velocity(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        sums = {name: torch.zeros_like(part) for name, part in x.items()}
        counts = {name: part.new_zeros(len(part), 1) for name, part in x.items()}
        for one, rows in zip(velocities, windows, strict=True):
            found = one({name: part[rows[name]] for name, part in x.items()}, t)
            for name, part in found.items():
                sums[name][rows[name]] += part
                counts[name][rows[name]] += 1
        return {name: sums[name] / counts[name] for name in x}

    return velocity
