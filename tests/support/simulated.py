"""A simulated run: loaders of all its ranks in one process, the trainer's own ledger and state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.fork_server import fork_early
from kinodit.data.loader import Loader, StepData
from kinodit.data.manifest import Dataset
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel, PlanSpec
from kinodit.trainer.consumed import ConsumedLedger
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import TrainState

T = TypeVar("T")
STATE, DIGESTS = "state.json", "digests.jsonl"


@dataclass(frozen=True)
class Simulated(Mesh):
    """A data-parallel rank of several in one process: what the main one does is done once."""

    done: list[Any] = field(default_factory=list)

    def from_main(self, function: Callable[[], T]) -> T:
        if not self.done:
            self.done.append(function())
        result: T = self.done[0]
        return result


@dataclass(frozen=True)
class Life:
    """One start: `workers` 0 decodes one sample at a time, a step ahead at most."""

    data: str
    run: str
    dp_size: int
    workers: int
    packing: str
    steps: int


def settings_of(life: Life) -> DataConfig:
    budgets: dict[str, Any] = {}
    if life.packing == "budget":
        budgets = {"packing": "budget", "token_budget": 60, "window_steps": 3}
    return DataConfig(
        datasets={"clips": DatasetConfig(life.data)}, num_frames=4, fps=6.0, height=24, width=24,
        samples_per_step=12, packs_per_step=5, num_threads=max(1, life.workers),
        prefetch_steps=max(1, life.workers), **budgets,
    )  # fmt: skip


def opened(life: Life) -> tuple[PlanSpec, dict[str, Dataset], DataConfig]:
    settings = settings_of(life)
    datasets = {"clips": Dataset(life.data)}
    return plan_spec(settings, datasets, CostModel(20, 5, 0, 3), seed=3), datasets, settings


def live(life: Life) -> None:
    """From the saved step to the last one: load, note what was consumed, save."""
    torch.set_num_threads(1)
    fork_early()
    run = Path(life.run)
    spec, datasets, settings = opened(life)
    state = TrainState(0, 0, 0, spec.fingerprint)
    if (run / STATE).is_file():
        state = TrainState.from_json((run / STATE).read_text(), STATE)
    with ExitStack() as stack:
        done: list[Any] = []
        ledgers = [
            ConsumedLedger(
                run,
                Simulated(torch.device("cpu"), dp_index=rank, dp_size=life.dp_size, done=done),
                state,
            )
            for rank in range(life.dp_size)
        ]
        for ledger in ledgers:
            stack.callback(ledger.close)
        loaders = [
            stack.enter_context(
                Loader(spec, datasets, settings, rank, life.dp_size, state.data_step, life.steps)
            )
            for rank in range(life.dp_size)
        ]
        digests = stack.enter_context((run / DIGESTS).open("a", buffering=1))
        for step in range(state.step, life.steps):
            data = [next(loader) for loader in loaders]
            for ledger, own in zip(ledgers, data, strict=True):
                ledger.add(step, own)
            digests.write(json.dumps([step, digest(data)]) + "\n")
            state = TrainState(step + 1, 0, 0, spec.fingerprint)
            temporary = run / f"{STATE}.tmp"
            temporary.write_text(state.to_json())
            temporary.replace(run / STATE)


def digest(data: list[StepData]) -> str:
    """Of every pixel, caption and key of a global batch, whatever ranks it lies on."""
    samples = {s.ref.slot: s for own in data for pack in own.packs for s in pack}
    found = hashlib.sha256()
    for slot in sorted(samples):
        sample = samples[slot]
        assert sample.video is not None
        found.update(f"{sample.key} {sample.caption} {sample.view}".encode())
        found.update(sample.video.numpy().tobytes())
    return found.hexdigest()
