"""Saving while training: at most one save in flight, none forgotten, none that stops a run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kinodit.trainer.checkpoint.commit import Party, Save
from kinodit.trainer.checkpoint.config import CheckpointConfig
from kinodit.trainer.checkpoint.entries import check_entries, num_bytes
from kinodit.trainer.checkpoint.staging import Copy, Stager
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import CheckpointError, TrainState


@dataclass(frozen=True)
class Outcome:
    """How a save ended.

    path:    the checkpoint, there or not
    step:    of the run
    failure: "" if it is there
    notes:   what went wrong beside
    seconds: from its start to its end
    """

    path: Path
    step: int
    failure: str
    notes: tuple[str, ...]
    seconds: float


class Saver:
    """Writes the checkpoints of a run. Every rank has one and makes the same calls.

    Asynchronous saves copy the state in a thread of their own, beside the next forward and
    backward, and write it there; `wait_for_copy` has to be called before the state changes.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        mesh: Mesh,
        facts: Mapping[str, Any],
        deadline_s: float = 1800.0,
    ) -> None:
        """Collective: makes a process group, so that background saves disturb nobody.

        facts: sections of the manifest; deadline_s: how long a rank waits for another.
        """
        self._run_dir = run_dir
        self._config = config
        self._mesh = mesh
        self._facts = facts
        self._group = None
        if mesh.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))
        self._party = Party(mesh.rank, mesh.world_size, self._group)
        self._stager = Stager()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy: Copy | None = None
        self._future: Future[Outcome] | None = None
        self._last: Outcome | None = None
        self.num_failed = 0
        self.stall_s = 0.0

    def save(self, state: TrainState, tensors: Mapping[str, Tensor]) -> list[Outcome]:
        """Begin a save; what ended meanwhile: the save before, and this one if it is synchronous.

        Waits for a save that is still in flight. Collective.

        Raises:
            CheckpointError: an entry that would be lost; or a save failed and the recipe says stop.
        """
        ended = self.drain()
        start = time.perf_counter()
        check_entries(tensors, self._mesh)
        token = self._mesh.from_main(lambda: uuid.uuid4().hex[:8])
        save = Save(self._run_dir, state, self._facts, self._config.keep_last, self._party, token)
        try:
            save.prepare(num_bytes(tensors))
        except CheckpointError as error:
            ended.append(self._settled(_failed(save, error, start)))
            return ended
        if self._config.mode == "sync":
            ended.append(self._settled(_written(save, None, tensors, start)))
        else:
            self._copy = self._stager.begin(tensors)
            self._future = self._pool.submit(_written, save, self._copy, tensors, start)
        self.stall_s += time.perf_counter() - start
        return ended

    def wait_for_copy(self) -> None:
        """Return when the state may change."""
        if self._copy is not None:
            start = time.perf_counter()
            self._copy.wait()
            self._copy = None
            self.stall_s += time.perf_counter() - start

    def poll(self) -> list[Outcome]:
        """What ended since the last call; asked after every step.

        Where a failure stops the run all ranks have to learn of it at the same step: then this is
        collective while a save is in flight.

        Raises:
            CheckpointError: on all ranks: the save failed, and the recipe says stop.
        """
        if self._future is None:
            return []
        done = self._future.done()
        if self._config.on_failure == "stop" and self._mesh.world_size > 1:
            pending = self._mesh.sum(torch.tensor([int(not done)]))
            done = not pending.item()
        return self.drain() if done else []

    def drain(self) -> list[Outcome]:
        """Wait for the save in flight, if there is one; how it ended.

        Raises:
            CheckpointError: it failed, and the recipe says stop.
        """
        if self._future is None:
            return []
        self.wait_for_copy()
        future, self._future = self._future, None
        return [self._settled(future.result())]

    @property
    def last(self) -> Outcome | None:
        """How the last save ended; None before the first."""
        return self._last

    def close(self) -> None:
        """Wait for the save in flight and end the thread; failures of that save are not raised."""
        if self._future is not None:
            self._future.exception()
            self._future = None
        self._pool.shutdown()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _settled(self, outcome: Outcome) -> Outcome:
        self._last = outcome
        if outcome.failure:
            self.num_failed += 1
            if self._config.on_failure == "stop":
                raise CheckpointError(outcome.failure)
        return outcome


def _written(save: Save, copy: Copy | None, tensors: Mapping[str, Tensor], start: float) -> Outcome:
    """Write one save, in whichever thread."""

    def staged() -> Mapping[str, Tensor]:
        if copy is None:
            return tensors
        save.reach("checkpoint:before-copy")
        copies = copy.finish()
        save.reach("checkpoint:after-copy")
        return copies

    try:
        notes = save.write(staged)
    except CheckpointError as error:
        return _failed(save, error, start)
    finally:
        if copy is not None:
            copy.give_up()
    seconds = time.perf_counter() - start
    return Outcome(save.final, save.state.step, "", tuple(notes), seconds)


def _failed(save: Save, error: CheckpointError, start: float) -> Outcome:
    return Outcome(save.final, save.state.step, str(error), (), time.perf_counter() - start)
