"""Checking a checkpoint's files against its manifest, shared out over the ranks.

Hashing runs in threads beside whatever else this rank does (reading the same files, above all),
since sha256 and reads release the interpreter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kinodit.trainer.checkpoint.manifest import (
    BrokenCheckpoint,
    FileRecord,
    Manifest,
    read_manifest,
)

CHUNK_BYTES = 1 << 20
MAX_THREADS = 8


def check_sizes(path: Path, manifest: Manifest) -> list[str]:
    """What is missing or has another size; a sentence per file."""
    found = []
    for name, record in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            found.append(f"{path.name}/{name}: expected {record.size} bytes, found no file")
            continue
        if size != record.size:
            found.append(f"{path.name}/{name}: expected {record.size} bytes, found {size}")
    return found


class Hashing:
    """Hashes files of a checkpoint in the background; a share of them where ranks share."""

    def __init__(
        self, path: Path, files: Mapping[str, FileRecord], index: int = 0, count: int = 1
    ) -> None:
        """Start on every `count`-th file, from the `index`-th on, the largest first."""
        by_size = sorted(files.items(), key=lambda item: (-item[1].size, item[0]))
        ours = by_size[index::count]
        num_threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)), len(ours)))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="verify")
        self._jobs: list[Future[str]] = [
            self._pool.submit(_check_file, path, name, record) for name, record in ours
        ]

    def problems(self) -> list[str]:
        """Wait; a sentence for each file that is not what was written."""
        found = [job.result() for job in self._jobs]
        self._pool.shutdown()
        return [problem for problem in found if problem]


def verify(path: Path) -> list[str]:
    """Every problem of the checkpoint folder `path`, in one process; empty if it is good."""
    try:
        manifest = read_manifest(path)
    except BrokenCheckpoint as error:
        return [str(error)]
    return check_sizes(path, manifest) or Hashing(path, manifest.files).problems()


def _check_file(path: Path, name: str, record: FileRecord) -> str:
    """What is wrong with a file; "" if nothing is."""
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    try:
        with (path / name).open("rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                digest.update(view[:size])
    except OSError as error:
        return f"{path.name}/{name}: cannot be read ({error.strerror})"
    found = digest.hexdigest()
    if found == record.sha256:
        return ""
    return f"{path.name}/{name}: expected sha256 {record.sha256[:12]}, found {found[:12]}"


def one_line(problems: Sequence[str]) -> str:
    """Problems as a sentence; the first three of many."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
