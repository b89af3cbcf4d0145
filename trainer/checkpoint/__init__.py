"""Checkpoints: written aside, hashed, published whole by a rename; read verified, at any layout.

`Saver` writes them while a run trains; `restore` finds the newest good one. docs/checkpoints.md is
for whoever has to deal with a broken one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kinodit.trainer.checkpoint.commit import STATE_FILE
from kinodit.trainer.checkpoint.config import CheckpointConfig
from kinodit.trainer.checkpoint.folder import find_checkpoints, recover, step_of
from kinodit.trainer.checkpoint.load import Accept, Restored, load, load_state, restore
from kinodit.trainer.checkpoint.manifest import (
    MANIFEST_FILE,
    BrokenCheckpoint,
    Manifest,
    read_manifest,
)
from kinodit.trainer.checkpoint.saver import Outcome, Saver
from kinodit.trainer.checkpoint.verify import verify
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine

__all__ = [
    "MANIFEST_FILE",
    "STATE_FILE",
    "Accept",
    "BrokenCheckpoint",
    "CheckpointConfig",
    "Manifest",
    "Outcome",
    "Restored",
    "Saver",
    "collect",
    "find_checkpoints",
    "load",
    "load_state",
    "put_back",
    "read_manifest",
    "recover",
    "restore",
    "step_of",
    "verify",
]


def collect(engine: Engine, emas: Mapping[str, Ema]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by canonical name. Collective."""
    tensors = engine.state()
    for label, ema in emas.items():
        average = engine.canonical(ema.average)
        tensors |= {f"ema/{label}/{name}": value for name, value in average.items()}
    return tensors


def put_back(engine: Engine, emas: Mapping[str, Ema], tensors: Mapping[str, Tensor]) -> None:
    """Go on from what was written into the tensors of `collect`. Collective."""
    engine.load({name: value for name, value in tensors.items() if not name.startswith("ema/")})
    for label, ema in emas.items():
        prefix = f"ema/{label}/"
        average = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        engine.assign(ema.average, average)
