"""Names on disk: which folders are checkpoints, which are leftovers, and what may be removed.

RUN/checkpoints/step-00000500/             a checkpoint: it appears whole, by a rename
RUN/checkpoints/step-00001000.tmp-TOKEN/   being written
RUN/checkpoints/step-00000500.old-TOKEN/   being removed or replaced
RUN/checkpoints/quarantine/                what an interrupted or broken save left behind
RUN/checkpoints/latest                     the name of the newest: a hint, nothing relies on it
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from kinodit.trainer.checkpoint.manifest import MANIFEST_FILE, read_manifest
from kinodit.trainer.state import CheckpointError

FOLDER = "checkpoints"
QUARANTINE = "quarantine"
LATEST_FILE = "latest"
NUM_QUARANTINED = 2
"""Partial ones that are kept to be looked at; older ones make room. What once was whole stays."""

_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"step-\d{8,}\.tmp-\w+")
_OLD = re.compile(r"(step-\d{8,})\.old-\w+")


def path_of(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, or of one on its way out, from its name."""
    return int(path.name.removeprefix("step-").split(".")[0])


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first: folders of the exact name with a manifest."""
    found = [p for p in (run_dir / FOLDER).glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted((path for path in found if (path / MANIFEST_FILE).is_file()), key=step_of)


def is_whole(path: Path) -> bool:
    """Whether every file is there with its size: what can be known without reading it all."""
    try:
        manifest = read_manifest(path)
        return all(
            (path / name).stat().st_size == record.size for name, record in manifest.files.items()
        )
    except (CheckpointError, OSError):
        return False


def recover(run_dir: Path) -> list[str]:
    """Clear up what interrupted saves left, before anything is read; says what it did.

    Rank 0 alone, and only while no save is in flight.
    """
    folder = run_dir / FOLDER
    said = []
    for path in sorted(folder.glob("*")):
        old = _OLD.fullmatch(path.name)
        if old and (path / MANIFEST_FILE).is_file() and not (folder / old[1]).exists():
            path.rename(folder / old[1])
            said.append(f"{old[1]} was about to be replaced: it is back")
        elif old:
            shutil.rmtree(path, ignore_errors=True)
        elif _PARTIAL.fullmatch(path.name):
            quarantine(path)
            said.append(f"{path.name} is not a complete checkpoint: moved to {FOLDER}/{QUARANTINE}")
        elif path.name.startswith(f"{LATEST_FILE}.tmp-"):
            path.unlink(missing_ok=True)
    if said:
        sync(folder)
    return said


def quarantine(path: Path) -> Path:
    """Move a leftover or broken checkpoint aside, where nothing looks for checkpoints."""
    folder = path.parent / QUARANTINE
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    if target.exists():
        target = folder / f"{path.name}-{uuid.uuid4().hex[:8]}"
    path.rename(target)
    os.utime(target)
    partial = [item for item in folder.iterdir() if not (item / MANIFEST_FILE).is_file()]
    partial.sort(key=lambda item: (item.stat().st_mtime, item.name))
    for item in partial[:-NUM_QUARANTINED]:
        shutil.rmtree(item, ignore_errors=True)
    return target


def prunable(run_dir: Path, keep_last: int) -> list[Path]:
    """Checkpoints that may be removed, oldest first; never one of the last `keep_last` whole ones.

    The newest whole one is kept even at `keep_last` 0 or when `latest` names another. A checkpoint
    with a file missing counts for nothing: it cannot push a good one out. What an earlier removal
    left half done comes first.
    """
    found = find_checkpoints(run_dir)
    whole = [path for path in found if is_whole(path)]
    if not whole:
        return []
    kept = set(whole[-max(keep_last, 1) :])
    hinted = read_latest(run_dir)
    oldest = min(map(step_of, kept))
    return [
        *(path for path in _removals(run_dir) if step_of(path) < oldest),
        *(path for path in found if path not in kept and path.name != hinted),
    ]


def _removals(run_dir: Path) -> list[Path]:
    """Checkpoints that lost their names on the way out, or to one that was saved again."""
    return sorted(p for p in (run_dir / FOLDER).glob("step-*") if _OLD.fullmatch(p.name))


def discard(path: Path, between: Callable[[], None] = lambda: None) -> None:
    """Remove a checkpoint; at no moment is there half of one under a checkpoint's name.

    `between` is called when it has lost its name and still has its files.
    """
    old = path
    if not _OLD.fullmatch(path.name):
        old = path.with_name(f"{path.name}.old-{uuid.uuid4().hex[:8]}")
        path.rename(old)
    between()
    # Without its manifest it is nobody's checkpoint, however far the removal comes.
    (old / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(old)


def read_latest(run_dir: Path) -> str:
    """What `latest` says; "" if there is none."""
    try:
        return (run_dir / FOLDER / LATEST_FILE).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def write_latest(path: Path) -> None:
    """Let `latest` name `path`, atomically."""
    target = path.parent / LATEST_FILE
    temporary = target.with_name(f"{LATEST_FILE}.tmp-{uuid.uuid4().hex[:8]}")
    write_synced(temporary, f"{path.name}\n")
    temporary.replace(target)
    sync(path.parent)


def write_synced(file: Path, text: str, between: Callable[[], None] = lambda: None) -> None:
    """Write `text` to disk. `between` is called when half of it is written."""
    data = text.encode()
    with file.open("xb") as stream:
        stream.write(data[: len(data) // 2])
        stream.flush()
        between()
        stream.write(data[len(data) // 2 :])
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """What the system refused, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full: {text}"
    return text
