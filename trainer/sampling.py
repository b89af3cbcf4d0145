"""Clips from a run on disk, without its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kinodit.data.encode import SampleEncoder
from kinodit.trainer import checkpoint
from kinodit.trainer.config import CONFIG_FILE, RunConfig, load_config
from kinodit.trainer.encoders import build_encoders
from kinodit.trainer.engine.config import NativeConfig
from kinodit.trainer.gallery import Entry, Gallery
from kinodit.trainer.generate import SampleConfig
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.setup import Parts, build_parts, master_dtype
from kinodit.trainer.split_encoders import split_encoders
from kinodit.trainer.state import CheckpointError
from kinodit.trainer.topology import Topology


def load_run(run_dir: Path) -> RunConfig:
    """The resolved recipe of a run.

    Raises:
        CheckpointError: the folder is not a run's.
    """
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}")
    return load_config(file)


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the last one.

    Raises:
        CheckpointError: there is none; the message lists those that exist.
    """
    found = {checkpoint.step_of(path): path for path in checkpoint.find_checkpoints(run_dir)}
    if not found:
        raise CheckpointError(f"{run_dir} has no complete checkpoint yet")
    wanted = max(found) if step is None else step
    if wanted not in found:
        raise CheckpointError(
            f"{run_dir} has no checkpoint of step {wanted}; it has steps "
            f"{', '.join(map(str, sorted(found)))}"
        )
    return found[wanted]


def load_parts(
    run_dir: Path, config: RunConfig, step: int | None, topology: Topology, device: torch.device
) -> tuple[RunConfig, Parts]:
    """A run's model with the weights of a checkpoint, resharded over these ranks. Collective.

    How training was laid out does not matter: the recipe is returned without it.
    """
    path = find_checkpoint(run_dir, step)
    config = dataclasses.replace(config, parallel=ParallelConfig(), engine=NativeConfig())
    mesh = build_mesh(config.parallel, topology.world_size, topology.rank, device)
    whole = build_encoders(config, run_dir, device)
    encoders = split_encoders(whole, 0, topology, device)
    parts = build_parts(config, mesh, SampleEncoder(encoders, config.run.seed, 0.0))
    tensors = checkpoint.collect(parts.engine, parts.emas)
    checkpoint.load(path, tensors, mesh)
    checkpoint.put_back(parts.engine, parts.emas, tensors)
    return config, parts


def sample_run(
    run_dir: Path,
    config: RunConfig,
    settings: SampleConfig,
    prompts: Sequence[str],
    folder: Path,
    step: int | None,
    topology: Topology,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Entry]:
    """Draw `prompts` with a run's checkpoint into `folder`; entries on rank 0. Collective.

    `progress` is given how many steps of the time grid are done, of those of this rank's clips.
    """
    config, parts = load_parts(run_dir, config, step, topology, device)
    return Gallery(config, parts, master_dtype(config), progress)(folder, prompts, settings)
