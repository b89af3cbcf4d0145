"""Checkpoints: written to a temporary folder, renamed when whole, read at any number of ranks.

Tensors go through torch.distributed.checkpoint (DCP), sharded as they live and resharded on load.
DCP silently keeps one copy of plain tensors that differ between ranks under one name, so every
entry must be a DTensor, or this must be a run of one process.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.models.errors import ConfigError
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import CheckpointError, TrainState

STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointConfig:
    """every_steps: 0 = only at the end; keep_last: older ones are removed, 0 = keep all."""

    every_steps: int = 500
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep_last < 0:
            raise ConfigError(
                f"checkpoint.every_steps={self.every_steps}, keep_last={self.keep_last}: "
                "must not be negative"
            )


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Temporary folders have other names."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(path for path in found if (path / STATE_FILE).is_file())


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(path.name.removeprefix("step-"))


def collect(engine: Engine, emas: Mapping[str, Ema]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by canonical name, as it lives."""
    tensors = engine.state()
    for label, ema in emas.items():
        tensors |= {f"ema/{label}/{name}": value for name, value in ema.average.items()}
    return tensors


def save(
    run_dir: Path, state: TrainState, tensors: Mapping[str, Tensor], mesh: Mesh, keep_last: int
) -> Path:
    """Write a checkpoint and publish it by a rename. Collective.

    Raises:
        CheckpointError: the folder cannot be written (disk full, permissions).
    """
    if mesh.world_size > 1:
        plain = [name for name, value in tensors.items() if not isinstance(value, DTensor)]
        assert not plain, f"per-rank tensors would be de-duplicated: {plain[:3]}"
    final = run_dir / "checkpoints" / f"step-{state.step:08d}"
    token = mesh.from_main(lambda: uuid.uuid4().hex[:8])
    temporary = final.with_name(f"{final.name}.tmp-{token}")
    try:
        with _alone_on_purpose():
            dcp.save(dict(tensors), checkpoint_id=temporary, no_dist=mesh.world_size == 1)
        if mesh.is_main:
            (temporary / STATE_FILE).write_text(state.to_json())
            _sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(final.parent)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(f"cannot write checkpoint {final}: {_reason(error)}") from error
    mesh.barrier()
    if mesh.is_main and keep_last:
        for old in find_checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    return final


def load_state(path: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = path / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {STATE_FILE}")
    return TrainState.from_json(file.read_text(), str(file))


def load(path: Path, tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Read a checkpoint into `tensors`, in place, whatever the layout that wrote it. Collective.

    Raises:
        CheckpointError: an entry is missing or has another shape.
    """
    try:
        with _alone_on_purpose():
            dcp.load(dict(tensors), checkpoint_id=path, no_dist=mesh.world_size == 1)
    except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"cannot load {path} into this model: {_reason(error)}. "
            "Was it written with another recipe?"
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong, on one line; DCP's own error is a traceback of every rank."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(
            f"rank {rank}: {type(cause).__name__} {' '.join(str(cause).split())}"
            for rank, (cause, _) in sorted(error.failures.items())
        )
    return " ".join(str(error).split())


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without DCP's warning that a single process is saving: it is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
