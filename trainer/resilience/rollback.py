"""Going back: to the last checkpoint that can be trusted, and past the data that led astray.

The data order stays a pure function. What is passed over is one number of the training state, its
`data_offset`; it is also written to RUN/rollbacks.jsonl before the run goes on, so that a restart
from the same checkpoint takes the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kinodit.trainer import checkpoint
from kinodit.trainer.jsonl import JsonLines, read_rows
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.parts import local_part
from kinodit.trainer.resilience.errors import DivergedError
from kinodit.trainer.state import TrainState

JOURNAL_FILE = "rollbacks.jsonl"
SET_ASIDE = "set-aside"
"""Folder beside the checkpoints for those that the run went back from."""


class RollBack(Exception):
    """The parameters are suspect; raised on all ranks alike.

    good_step: a checkpoint of this step or an earlier one can be trusted
    data_step: the first step of the data plan to take afterwards
    """

    def __init__(self, good_step: int, data_step: int, reason: str) -> None:
        super().__init__(reason)
        self.good_step, self.data_step, self.reason = good_step, data_step, reason


def roll_back(run_dir: Path, cause: RollBack, max_rollbacks: int) -> str:
    """Set aside what cannot be trusted and write the journal; what was done. Rank 0 only.

    Raises:
        DivergedError: the run went back to the same checkpoint `max_rollbacks` times already.
    """
    found = checkpoint.find_checkpoints(run_dir)
    good = [path for path in found if checkpoint.step_of(path) <= cause.good_step]
    # Without a checkpoint to trust, the start of the run is one: weights are drawn by name.
    to_step = checkpoint.step_of(good[-1]) if good else 0
    times = sum(row["to_step"] == to_step for row in _entries(run_dir))
    if times >= max_rollbacks:
        raise DivergedError(
            f"given up at step {cause.good_step}: {cause.reason}; the run went back to step "
            f"{to_step} {times} times already (resilience.guard.max_rollbacks={max_rollbacks}). "
            "Lower optim.lr, lengthen schedule.warmup_steps, or look at the data of these steps"
        )
    aside = run_dir / "checkpoints" / SET_ASIDE
    for path in found[len(good) :]:
        aside.mkdir(exist_ok=True)
        path.rename(aside / f"{path.name}-{times + 1}-to-{to_step}")
    journal = JsonLines(run_dir / JOURNAL_FILE)
    entry = {
        "to_step": to_step,
        "data_offset": cause.data_step - to_step,
        "from_step": cause.good_step,
        "reason": cause.reason,
    }
    journal.append(entry)
    journal.close()
    return (
        f"{cause.reason}: back to step {to_step}, with the data from plan step "
        f"{cause.data_step} on ({times + 1} of {max_rollbacks})"
    )


def past_bad_data(run_dir: Path, state: TrainState) -> TrainState:
    """`state` of a checkpoint with the offset of the last rollback to it, if there was one."""
    offsets = [row["data_offset"] for row in _entries(run_dir) if row["to_step"] == state.step]
    return replace(state, data_offset=max([state.data_offset, *offsets]))


def _entries(run_dir: Path) -> list[dict[str, int]]:
    path = run_dir / JOURNAL_FILE
    return [row for row in read_rows(path) if row is not None] if path.is_file() else []


def check_finite(tensors: Mapping[str, Tensor], state: TrainState, mesh: Mesh) -> None:
    """Let nothing be saved that is not finite. Collective.

    Raises:
        RollBack: some rank holds a value that is not.
    """
    parts = [local_part(tensor) for tensor in tensors.values()]
    ends: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for part in parts:
        if part.numel() and part.is_floating_point():
            # Both ends are nan where any value is.
            ends[part.device, part.dtype] += torch.aminmax(part)
    # One number for the host: each would be a wait for the device.
    good = [torch.isfinite(torch.stack(found)).all().to(mesh.device) for found in ends.values()]
    if mesh.any(bool(good) and not bool(torch.stack(good).all())):
        raise RollBack(
            state.step - 1, state.data_step, "parameters or averages are not finite; not saved"
        )
