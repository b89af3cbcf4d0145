"""Checking a checkpoint's files against its manifest, shared out over the ranks.

Hashing runs in threads beside whatever else this rank does (reading the same files, above all),
since sha256 and reads release the interpreter. Blocks are hashed one by one, so that all cores
work on one file: with one thread, the largest file would be read sooner than it is hashed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from kinodit.trainer.checkpoint.manifest import (
    BLOCK_BYTES,
    FileRecord,
    Manifest,
    join_digests,
    read_manifest,
)
from kinodit.trainer.state import CheckpointError

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
        num_blocks = sum(_num_blocks(record) for _, record in ours)
        num_threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)), num_blocks))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="verify")
        self._buffers = threading.local()
        self._path = path
        self._files: list[tuple[str, FileRecord, list[Future[bytes]]]] = [
            (
                name,
                record,
                [
                    self._pool.submit(self._hash_block, path / name, block)
                    for block in range(_num_blocks(record))
                ],
            )
            for name, record in ours
        ]

    def problems(
        self, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[str]:
        """Wait; a sentence for each file that is not what was written.

        `progress` is called with (bytes hashed, bytes).
        """
        total, before, found = sum(record.size for _, record, _ in self._files), 0, []
        for name, record, blocks in self._files:
            for number, block in enumerate(blocks):
                wait([block])
                progress(before + min(record.size, (number + 1) * BLOCK_BYTES), total)
            before += record.size
            found.append(self._problem(name, record, blocks))
        self._pool.shutdown()
        return [problem for problem in found if problem]

    def _problem(self, name: str, record: FileRecord, blocks: Sequence[Future[bytes]]) -> str:
        """What is wrong with a file; "" if nothing is."""
        try:
            found = join_digests([block.result() for block in blocks])
        except OSError as error:
            return f"{self._path.name}/{name}: cannot be read ({error.strerror})"
        if found == record.sha256:
            return ""
        return f"{self._path.name}/{name}: expected sha256 {record.sha256[:12]}, found {found[:12]}"

    def _hash_block(self, file: Path, block: int) -> bytes:
        """The sha256 of a block, by a thread that keeps its buffer."""
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(BLOCK_BYTES))
        view: memoryview = self._buffers.view
        with file.open("rb", buffering=0) as stream:
            stream.seek(block * BLOCK_BYTES)
            filled = 0
            while filled < BLOCK_BYTES and (size := stream.readinto(view[filled:])):
                filled += size
        return hashlib.sha256(view[:filled]).digest()


def _num_blocks(record: FileRecord) -> int:
    return -(-record.size // BLOCK_BYTES)


def verify(
    path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Every problem of the checkpoint folder `path`, in one process; empty if it is good.

    `progress` is called with (bytes hashed, bytes).
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    return check_sizes(path, manifest) or Hashing(path, manifest.files).problems(progress)


def one_line(problems: Sequence[str]) -> str:
    """Problems as a sentence; the first three of many."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
