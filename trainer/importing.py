"""A run that begins from a checkpoint of another program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from kinodit.trainer.checkpoint import Saver, find_checkpoints
from kinodit.trainer.checkpoint.universal import universal_state, universal_tensors
from kinodit.trainer.config import CONFIG_FILE, RunConfig, config_to_yaml
from kinodit.trainer.drift import facts
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig
from kinodit.trainer.state import CheckpointError


def import_universal(source: Path, config: RunConfig, num_steps: int | None) -> Path:
    """The universal checkpoint `source` as the first one of the recipe's run; where it is.

    In one process, which holds all of it. Averages start from the parameters. num_steps: updates
    behind it, where it does not say so itself.

    Raises:
        CheckpointError: it is damaged, or the run has checkpoints already.
    """
    folder = config.run.folder
    if find_checkpoints(folder):
        raise CheckpointError(f"{folder} has checkpoints already: choose another run.name")
    state = universal_state(source, num_steps)
    tensors = dict(universal_tensors(source))
    for label in config.ema:
        tensors |= {
            f"ema/{label}/{name.removeprefix('model/')}": tensor
            for name, tensor in tensors.items()
            if name.startswith("model/")
        }
    # The layout of the run may change on every start, and here there is one process.
    origin = facts(replace(config, parallel=ParallelConfig()), 1)
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config_to_yaml(config))
    saver = Saver(folder, config.checkpoint, Mesh(torch.device("cpu")), origin)
    try:
        outcome = [*saver.save(state, tensors), *saver.drain()][-1]
    finally:
        saver.close()
    if outcome.failure:
        raise CheckpointError(outcome.failure)
    return outcome.path
