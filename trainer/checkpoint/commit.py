"""One save, from an empty folder to a checkpoint that is whole or not there at all.

    all   make step-N.tmp-TOKEN                       checkpoint:before-folder ... after-folder
    all   write and sync this rank's shards           before-shards, inside-shard, after-shards
    all   gather every file's size and sha256
    main  state.json, manifest.json, sync             before-manifest ... before-rename
    all   agree that everybody is content
    main  rename to step-N, sync the parent           after-rename
    main  `latest`                                    before-latest, after-latest
    all   read back this rank's shards, if old checkpoints are due to go
    main  remove those                                before-prune, inside-prune, end

Until the rename the checkpoint does not exist; after it nothing can take it away. After each line
the ranks tell each other how it went, so that all give up together. What fails after the rename is
told and does no harm.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.trainer import faults
from kinodit.trainer.checkpoint import folder as disk
from kinodit.trainer.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, record_of
from kinodit.trainer.checkpoint.shards import write_shards
from kinodit.trainer.checkpoint.verify import Hashing, one_line
from kinodit.trainer.state import CheckpointError, TrainState

STATE_FILE = "state.json"
SPARE_BYTES = 1 << 20
"""Beyond the tensors: index, manifest, names."""

T = TypeVar("T")


@dataclass(frozen=True)
class Party:
    """The ranks that save together, and how they talk. group: None alone."""

    rank: int
    size: int
    group: ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return cast(list[T], values)

    def agree(self, action: Callable[[], T]) -> list[T]:
        """Do `action` on every rank; what it returned, by rank. Collective.

        Raises:
            CheckpointError: on all ranks, if the system refused something to any.
        """
        value, failure = None, ""
        try:
            value = action()
        except (OSError, CheckpointError) as error:
            failure = disk.reason(error)
        answers = self.gather((value, failure))
        failures = [f"rank {rank}: {said}" for rank, (_, said) in enumerate(answers) if said]
        if failures:
            raise CheckpointError("; ".join(failures))
        return cast(list[T], [value for value, _ in answers])


@dataclass(frozen=True)
class Save:
    """One save: where, of what position of the run, and what the manifest says of its origin."""

    run_dir: Path
    state: TrainState
    facts: Mapping[str, Any]
    keep_last: int
    party: Party
    token: str

    @property
    def final(self) -> Path:
        """The folder that will appear."""
        return disk.path_of(self.run_dir, self.state.step)

    @property
    def temporary(self) -> Path:
        """The folder until then."""
        return self.final.with_name(f"{self.final.name}.tmp-{self.token}")

    def reach(self, point: str) -> None:
        """Let faults strike."""
        faults.reach(point, self.state.step)

    def prepare(self, num_bytes: int) -> None:
        """Make the temporary folder, if `num_bytes` fit on the disk. Collective.

        Raises:
            CheckpointError: on all ranks.
        """

        def make() -> None:
            self.reach("checkpoint:begin")
            self.reach("checkpoint:before-folder")
            if self.party.is_main:
                self.temporary.parent.mkdir(parents=True, exist_ok=True)
                check_free(self.temporary.parent, num_bytes + SPARE_BYTES)
                self.temporary.mkdir()
            self.reach("checkpoint:after-folder")

        self._or_clean_up(partial(self.party.agree, make))

    def write(self, tensors: Callable[[], Mapping[str, Tensor]]) -> list[str]:
        """Write and publish what `tensors` returns; what went wrong after that, harmlessly.

        Collective. Not to be called twice.

        Raises:
            CheckpointError: on all ranks: there is no new checkpoint, and no trace of one.
        """
        files: dict[str, FileRecord] = {}
        self._or_clean_up(lambda: files.update(self._write(tensors)))
        return self._tidy(files)

    def _write(self, tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, FileRecord]:
        """Up to the rename; this rank's files."""
        staged: list[Mapping[str, Tensor]] = []
        self.party.agree(lambda: staged.append(tensors()))
        files = write_shards(self.temporary, staged[0], self.party.group, self.reach)

        def written() -> dict[str, FileRecord]:
            self.reach("checkpoint:after-shards")
            return files

        every = self.party.agree(written)
        self.party.agree(partial(self._describe, every))
        self.party.agree(self._publish)
        return files

    def _describe(self, every: Sequence[Mapping[str, FileRecord]]) -> None:
        self.reach("checkpoint:before-manifest")
        if self.party.is_main:
            state = self.state.to_json()
            disk.write_synced(self.temporary / STATE_FILE, state)
            files = {name: record for files in every for name, record in files.items()}
            files[STATE_FILE] = record_of(state.encode())
            disk.write_synced(
                self.temporary / MANIFEST_FILE,
                Manifest(self.state.step, files, self.facts).to_text(),
                partial(self.reach, "checkpoint:inside-manifest"),
            )
            disk.sync(self.temporary)
        else:
            self.reach("checkpoint:inside-manifest")
        self.reach("checkpoint:after-manifest")
        self.reach("checkpoint:before-rename")

    def _publish(self) -> None:
        if not self.party.is_main:
            return
        replaced = None
        if self.final.exists():
            # Steps that are taken again: the old one keeps its files until the new one is there.
            replaced = self.final.with_name(f"{self.final.name}.old-{self.token}")
            self.final.rename(replaced)
        try:
            self.temporary.rename(self.final)
        except OSError:
            if replaced is not None:
                replaced.rename(self.final)
            raise
        disk.sync(self.final.parent)
        if replaced is not None:
            (replaced / MANIFEST_FILE).unlink(missing_ok=True)
            shutil.rmtree(replaced, ignore_errors=True)

    def _tidy(self, files: Mapping[str, FileRecord]) -> list[str]:
        said = ""
        try:
            self.reach("checkpoint:after-rename")
            self.reach("checkpoint:before-latest")
            if self.party.is_main:
                disk.write_latest(self.final)
            self.reach("checkpoint:after-latest")
        except OSError as error:
            said = f"{self.final.name} is saved, but rank {self.party.rank}: {disk.reason(error)}"
        notes = self.party.gather(said)
        return [note for note in [*notes, *self._prune(files)] if note]

    def _prune(self, files: Mapping[str, FileRecord]) -> list[str]:
        """Remove old checkpoints, once what stays has been read back from the disk."""
        victims = self.party.gather(
            disk.prunable(self.run_dir, self.keep_last)
            if self.party.is_main and self.keep_last
            else []
        )[0]
        if not victims:
            return []
        problems = self.party.gather(Hashing(self.final, files).problems())
        broken = [problem for found in problems for problem in found]
        if broken:
            return [f"old checkpoints are kept, for the new one is broken: {one_line(broken)}"]
        said = ""
        try:
            self.reach("checkpoint:before-prune")
            between = partial(self.reach, "checkpoint:inside-prune")
            for old in victims if self.party.is_main else []:
                disk.discard(old, between)
            if not self.party.is_main:
                between()
            self.reach("checkpoint:end")
        except OSError as error:
            said = f"rank {self.party.rank}: cannot remove old checkpoints: {disk.reason(error)}"
        return self.party.gather(said)

    def _or_clean_up(self, action: Callable[[], object]) -> None:
        try:
            action()
        except CheckpointError as error:
            if self.party.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise CheckpointError(f"cannot write checkpoint {self.final}: {error}") from error


def check_free(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CheckpointError: says how much is needed and how much is there.
    """
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if free < num_bytes:
        raise CheckpointError(
            f"disk full: need {num_bytes / 2**20:.0f} MiB, have {free / 2**20:.0f} MiB: "
            "free some space, or lower checkpoint.keep_last"
        )
