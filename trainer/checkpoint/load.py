"""Reading a checkpoint back: verified, at any layout, from the one before if need be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from kinodit.trainer.checkpoint import folder as disk
from kinodit.trainer.checkpoint.commit import STATE_FILE
from kinodit.trainer.checkpoint.manifest import (
    MANIFEST_FILE,
    BrokenCheckpoint,
    Manifest,
    read_manifest,
)
from kinodit.trainer.checkpoint.restricted import INDEX_FILE, read_index
from kinodit.trainer.checkpoint.shards import ShardError, read_shards
from kinodit.trainer.checkpoint.verify import Hashing, check_sizes, one_line
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import CheckpointError, TrainState


def load_state(path: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = path / STATE_FILE
    if not (path / MANIFEST_FILE).is_file() or not file.is_file():
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST_FILE} or no {STATE_FILE}"
        )
    return TrainState.from_json(file.read_bytes().decode(errors="replace"), str(file))


def load(path: Path, tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Read a checkpoint into `tensors`, in place, whatever the layout that wrote it. Collective.

    Every file is hashed while it is read; after an error the tensors must not be used.

    Raises:
        BrokenCheckpoint: on all ranks: files are missing or not what was written.
        CheckpointError: it is whole, but an entry is missing or has another shape.
    """
    _load(path, mesh.from_main(partial(_open, path)), tensors, mesh)


def _load(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    shards = {name: record for name, record in manifest.files.items() if name not in _SMALL}
    hashing = Hashing(path, shards, mesh.rank, mesh.world_size)
    failure: ShardError | None = None
    try:
        read_shards(path, tensors, alone=mesh.world_size == 1)
    except ShardError as error:
        failure = error
    finally:
        ours = hashing.problems()
    _refuse(sorted(problem for found in mesh.gather_objects(ours) for problem in found))
    if failure is not None:
        raise CheckpointError(
            f"cannot load {path} into this model: {failure}. Was it written with another recipe?"
        ) from failure


Accept = Callable[[Path, TrainState, Manifest], TrainState]
"""May refuse a checkpoint (raise CheckpointError), or adjust its state."""


@dataclass(frozen=True)
class Restored:
    """What a run goes on from. broken: what was passed over, a sentence each."""

    path: Path
    state: TrainState
    manifest: Manifest
    broken: tuple[str, ...]


def restore(
    run_dir: Path,
    tensors: Mapping[str, Tensor],
    mesh: Mesh,
    *,
    strict: bool = False,
    accept: Callable[[Path, TrainState, Manifest], TrainState] = lambda path, state, manifest: (
        state
    ),
) -> Restored | None:
    """Load the newest checkpoint that is good; None if there is none at all. Collective.

    A broken one is put into quarantine and the one before is tried; all ranks decide alike. Where
    every one is broken the run must not start over by itself, which would look like a resume.

    accept: asked on every rank before tensors are read.

    Raises:
        CheckpointError: the newest is broken and `strict`; or all are; or none fits the model.
    """
    found = mesh.from_main(lambda: disk.find_checkpoints(run_dir)[::-1])
    broken: list[str] = []
    for path in found:
        try:
            manifest = mesh.from_main(partial(_open, path))
            state = mesh.from_main(partial(load_state, path))
            if accept is not None:
                state = accept(path, state, manifest)
            _load(path, manifest, tensors, mesh)
            newer = found[: found.index(path)]
            broken += mesh.from_main(partial(_set_aside, newer))
            return Restored(path, state, manifest, tuple(broken))
        except BrokenCheckpoint as error:
            older = found[found.index(path) + 1 :]
            if older:
                lost = disk.step_of(path) - disk.step_of(older[0])
                broken.append(f"{error}: going back to {older[0].name}, {lost} steps are lost")
            else:
                broken.append(f"{error}: there is no older one")
            if strict:
                raise CheckpointError(
                    f"checkpoint.strict=true, and a checkpoint is broken: {error}. Restore it, or "
                    "set checkpoint.strict=false to go on from the one before"
                ) from error
    if not found:
        return None
    raise CheckpointError(
        f"every checkpoint of {run_dir} is broken: {one_line(broken)}. Restore one from a copy, or "
        f"remove {run_dir / disk.FOLDER} to start over"
    )


_SMALL = (STATE_FILE, INDEX_FILE)


def _open(path: Path) -> Manifest:
    """The manifest of a folder whose files have the right sizes, and whose small ones are good.

    The small ones decide what is read at all.
    """
    manifest = read_manifest(path)
    _refuse(check_sizes(path, manifest))
    for name in _SMALL:
        if name not in manifest.files:
            raise BrokenCheckpoint(f"{path.name}/{name}: not in the manifest")
    small = {name: manifest.files[name] for name in _SMALL}
    _refuse(Hashing(path, small).problems())
    named = {info.relative_path for info in read_index(path).storage_data.values()}
    unknown = sorted(named - set(manifest.files))
    _refuse([f"{path.name}/{name}: not in the manifest" for name in unknown])
    return manifest


def _set_aside(paths: list[Path]) -> list[str]:
    """Put broken checkpoints into quarantine; what could not be moved is only told."""
    said = []
    for path in paths:
        try:
            said.append(f"{path.name} is in {disk.quarantine(path)}")
        except OSError as error:
            said.append(f"{path.name} is broken and stays where it is: {error}")
    return said


def _refuse(problems: list[str]) -> None:
    if problems:
        raise BrokenCheckpoint(one_line(problems))
