"""Small checkpoints of one process, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinodit.trainer.checkpoint import CheckpointConfig, Saver
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import TrainState

MESH = Mesh(torch.device("cpu"))
FACTS: dict[str, Any] = {"config": {"run": {"seed": 0}}, "mesh": {"world_size": 1}, "versions": {}}


def tensors_at(step: int) -> dict[str, Tensor]:
    """What a run of these tests has at `step`."""
    return {"model/w": torch.full((3,), float(step)), "ema/main/w": torch.arange(500.0) + step}


def empty() -> dict[str, Tensor]:
    return {"model/w": torch.zeros(3), "ema/main/w": torch.zeros(500)}


def state_at(step: int) -> TrainState:
    return TrainState(step, num_samples=4 * step, num_tokens=9 * step, plan="p")


def save(
    run_dir: Path,
    *steps: int,
    keep_last: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
    mode: str = "sync",
) -> Path:
    """Save at `steps`, one after the other; the last one's folder. It must be there."""
    config = CheckpointConfig(keep_last=keep_last, mode=mode)  # type: ignore[arg-type]
    saver = Saver(run_dir, config, MESH, FACTS)
    for step in steps:
        given = tensors_at(step) if tensors is None else tensors
        outcomes = saver.save(state_at(step), given) + saver.drain()
        assert not outcomes[-1].failure, outcomes[-1].failure
    saver.close()
    return outcomes[-1].path
