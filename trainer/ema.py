"""Exponential moving averages of the parameters, sharded as the parameters are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kinodit.models.errors import ConfigError
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.parallel.parts import local_part, spread


@dataclass(frozen=True)
class EmaConfig:
    """decay: per step, once warmed up; early steps use min(decay, (1 + step) / (10 + step))."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay={self.decay}: must be in [0, 1)")

    def decay_at(self, step: int) -> float:
        """Decay after the update of step `step` (0-based)."""
        return min(self.decay, (1 + step) / (10 + step))


class Ema:
    """One average of an engine's parameters, by its names, in their dtype and placement."""

    @torch.no_grad()
    def __init__(self, config: EmaConfig, engine: Engine) -> None:
        """Start from the present parameters of `engine`."""
        self.config = config
        self._engine = engine
        self.average = {
            name: spread(local_part(p).clone(), p) for name, p in engine.masters().items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters, after the update of step `step`."""
        weight = 1.0 - self.config.decay_at(step)
        masters = self._engine.masters()
        averages = [local_part(tensor) for tensor in self.average.values()]
        parameters = [local_part(masters[name]) for name in self.average]
        torch._foreach_lerp_(averages, parameters, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the context the model computes with the average instead of its parameters.

        Collective.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._engine.masters().items():
            ours, theirs = local_part(self.average[name]), local_part(parameter)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        self._engine.refresh()
