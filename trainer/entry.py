"""Entering a run's folder and leaving it: the lock, what is there already, and what is left behind.

All of it is done by rank 0 alone.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from kinodit.models.errors import ConfigError
from kinodit.trainer import checkpoint
from kinodit.trainer.config import CONFIG_FILE, RunConfig, check_resumable, config_to_yaml
from kinodit.trainer.events import append_event
from kinodit.trainer.resilience.errors import CrashLoopError
from kinodit.trainer.resilience.lock import RunLock
from kinodit.trainer.resilience.signals import Request, is_finished
from kinodit.trainer.resilience.starts import record_start
from kinodit.trainer.state import CheckpointError, TrainState
from kinodit.trainer.topology import Topology


def lock_folder(config: RunConfig, topology: Topology, stack: ExitStack) -> None:
    """Make the run's folder and hold its lock until `stack` is closed.

    Raises:
        ConfigError: the folder is another user's, who could put links where files are written.
    """
    folder = config.run.folder
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{folder} belongs to user {folder.stat().st_uid}, and this is user {os.getuid()}: "
            "choose another run.out_dir or run.name, or have the folder handed over (chown)"
        )
    job = topology.job
    stack.enter_context(RunLock(folder, job.id, job.num_restarts))


def open_run(run_dir: Path, config: RunConfig) -> tuple[Path | None, list[str]]:
    """Enter the run's folder; its last checkpoint, if any, and what was cleared up."""
    saved = run_dir / CONFIG_FILE
    if saved.is_file() and not config.checkpoint.accept_drift:
        check_resumable(saved.read_text(), config, run_dir)
    saved.write_text(config_to_yaml(config))
    try:
        leftovers = checkpoint.recover(run_dir)
    except OSError as error:
        raise CheckpointError(f"cannot clear up {run_dir}: {error}") from error
    checkpoints = checkpoint.find_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None, leftovers


def is_over(run_dir: Path, config: RunConfig, marker: Path) -> bool:
    """Whether the last step is saved already. Removes what an earlier start asked for."""
    marker.unlink(missing_ok=True)
    return is_finished(run_dir, config.run.steps) and bool(checkpoint.find_checkpoints(run_dir))


def count_start(config: RunConfig, topology: Topology, resumed_from: Path | None) -> int:
    """The number of this start; refused where the last ones led nowhere."""
    step = checkpoint.step_of(resumed_from) if resumed_from else 0
    limit = config.resilience.max_fruitless_restarts
    try:
        return record_start(config.run.folder, topology.job.id, step, limit)
    except CrashLoopError as error:
        append_event(config.run.folder, "stop", step, str(error))
        raise


def farewell(request: Request, state: TrainState) -> str:
    """Why the run ends here, and what it has seen."""
    why = {
        Request.NONE: "",
        Request.REQUEUE: "asked to save and come back; ",
        Request.STOP: "asked to save and stop; ",
    }
    return f"{why[request]}{state.num_samples} samples seen"
