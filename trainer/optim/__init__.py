"""Optimizers behind one protocol, rules for groups of parameters, and learning-rate schedules."""

from __future__ import annotations

from kinodit.trainer.optim.base import Optimizer
from kinodit.trainer.optim.build import build_optimizer, optimizer_bytes
from kinodit.trainer.optim.config import (
    OPTIMIZERS,
    AdamW8bitConfig,
    MuonConfig,
    OptimConfig,
    ParameterRule,
)
from kinodit.trainer.optim.schedule import ScheduleConfig

__all__ = [
    "OPTIMIZERS",
    "AdamW8bitConfig",
    "MuonConfig",
    "OptimConfig",
    "Optimizer",
    "ParameterRule",
    "ScheduleConfig",
    "build_optimizer",
    "optimizer_bytes",
]
