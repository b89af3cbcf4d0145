"""The ledger of consumed samples: what each step was trained on, over all starts of a run.

    RUN/consumed/lives.jsonl   one row per life: where it began, and on how many data-parallel ranks
    RUN/consumed/0003.jsonl    one row per step of data-parallel rank 3, written after the update

A *life* is a start, or what follows going back to a checkpoint. What a life did after the place
where a later one began is undone by that one: the last life that began at or before a step decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinodit.data.loader import StepData
from kinodit.models.errors import UserError
from kinodit.trainer.jsonl import JsonLines, read_rows
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import TrainState

FOLDER = "consumed"
LIVES = "lives.jsonl"


class ConsumedError(UserError):
    """A ledger that is not there or cannot be read."""


@dataclass(frozen=True)
class Life:
    """One life of a run.

    step:        optimizer step that it began with
    data_offset: plan step of an optimizer step, minus that
    num_ranks:   data-parallel ranks
    plan:        fingerprint of the plan's spec
    """

    number: int
    step: int
    data_offset: int
    num_ranks: int
    plan: str


@dataclass(frozen=True)
class Consumed:
    """One place of one step: the sample that the plan asked for, and what was trained on."""

    slot: int
    dataset: str
    epoch: int
    wanted: int
    used: int


class ConsumedLedger:
    """Writes what a data-parallel rank consumes. Collective to open; rows are each rank's own."""

    def __init__(self, run_dir: Path, mesh: Mesh, state: TrainState) -> None:
        """Begins a life at `state`."""
        folder = run_dir / FOLDER

        def begin() -> int:
            folder.mkdir(exist_ok=True)
            number = len(read_lives(run_dir)) if (folder / LIVES).is_file() else 0
            life = Life(number, state.step, state.data_offset, mesh.dp_size, state.plan)
            lives = JsonLines(folder / LIVES)
            lives.append(vars(life))
            lives.close()
            return number

        self._life = mesh.from_main(begin)
        self._rows: JsonLines | None = None
        if mesh.counts:
            self._rows = JsonLines(folder / f"{mesh.dp_index:04d}.jsonl")

    def add(self, step: int, data: StepData) -> None:
        """Notes that optimizer step `step` was done with `data`."""
        if self._rows is not None:
            self._rows.append(row_of(self._life, step, data))

    def close(self) -> None:
        """Closes the file."""
        if self._rows is not None:
            self._rows.close()


def row_of(life: int, step: int, data: StepData) -> dict[str, Any]:
    """The row of one step of one rank; `samples` are [slot, dataset, epoch, wanted, used]."""
    wanted = {item.slot: item.wanted for item in data.replaced}
    samples = [
        [ref.slot, ref.dataset, ref.epoch, wanted.get(ref.slot, ref.index), ref.index]
        for ref in (sample.ref for pack in data.packs for sample in pack)
    ]
    return {"life": life, "step": step, "data_step": data.step, "samples": samples}


def read_lives(run_dir: Path) -> list[Life]:
    """The lives of a run, in order. Raises ConsumedError."""
    path = run_dir / FOLDER / LIVES
    if not path.is_file():
        raise ConsumedError(
            f"{run_dir} has no ledger of consumed samples: train with --ledger to keep one"
        )
    try:
        return [Life(**row) for row in read_rows(path) if row is not None]
    except TypeError as error:
        raise ConsumedError(f"{path} is not a ledger of lives: {error}") from error


@dataclass(frozen=True)
class Steps:
    """What a run was trained on.

    samples: optimizer step -> its places over all ranks, as the deciding life had them
    plan_steps: optimizer step -> step of the data plan
    torn:    "step S: rank R wrote no row": steps of which a part is missing
    redone:  rows that a later life undid
    """

    samples: Mapping[int, list[Consumed]]
    plan_steps: Mapping[int, int]
    torn: tuple[str, ...]
    redone: int


def read_steps(run_dir: Path, lives: list[Life]) -> Steps:
    """The steps of all lives, put together. Raises ConsumedError."""
    rows: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for path in sorted((run_dir / FOLDER).glob("[0-9]*.jsonl")):
        for row in read_rows(path):
            if row is not None:
                rows.setdefault((row["life"], row["step"]), {})[int(path.stem)] = row
    samples: dict[int, list[Consumed]] = {}
    plan_steps: dict[int, int] = {}
    torn: list[str] = []
    last = max((step for _, step in rows), default=-1)
    kept = 0
    for step in range(last + 1):
        life = deciding(lives, step)
        found = rows.get((life.number, step), {})
        kept += len(found)
        missing = [rank for rank in range(life.num_ranks) if rank not in found]
        torn += [f"step {step}: rank {rank} of life {life.number} wrote none" for rank in missing]
        plan_steps[step] = step + life.data_offset
        try:
            samples[step] = [
                Consumed(*place) for rank in sorted(found) for place in found[rank]["samples"]
            ]
        except (KeyError, TypeError) as error:
            raise ConsumedError(f"a row of step {step} is damaged: {error}") from error
        wrong = {row["data_step"] for row in found.values()} - {plan_steps[step]}
        torn += [f"step {step} took plan step {other}" for other in sorted(wrong)]
    return Steps(samples, plan_steps, tuple(torn), sum(map(len, rows.values())) - kept)


def deciding(lives: list[Life], step: int) -> Life:
    """The last life that began at or before `step`. Raises ConsumedError if none did."""
    for life in reversed(lives):
        if life.step <= step:
            return life
    raise ConsumedError(
        f"the ledger begins at step {min(life.step for life in lives)}, so that nothing is known "
        f"of step {step}: it has to be kept from a run's first start"
    )
