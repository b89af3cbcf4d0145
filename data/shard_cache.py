"""Blocks of remote shards on a node's own disk, shared by its processes and bounded in size.

A block is fetched by one process while the others wait for it, appears under its name when it is
whole, and is removed when the cache is full and it was unused the longest. Whatever ends a process,
what it held is free again: locks are the kernel's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kinodit.data.storage import StorageError

NUM_LOCKS = 256
TOUCH_S = 30.0
"""How exactly it is known when a block was last used."""
KEEP_SHARE = 0.9
"""What is left of a full cache: blocks are not removed one by one."""
STALE_S = 3600.0
"""Age at which a half-written block belongs to nobody any more."""


class BlockCache:
    """At most `max_bytes` of blocks in `folder`. Threads and processes of a node share it.

    Raises StorageError if the folder is another user's: it could hold anything.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise StorageError(
                    f"data.storage.cache_dir: {folder} is not a folder of user {os.getuid()}: "
                    "choose another"
                )
            for name in ("blocks", "locks"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"data.storage.cache_dir: {folder}: {error.strerror}") from error
        self._touched: dict[str, float] = {}

    def block(
        self, name: str, fetch: Callable[[], bytes], first: int = 0, size: int | None = None
    ) -> bytes:
        """The block `name`; what `fetch` returns if no process of the node has it.

        name: plain, and of contents that never change
        first, size: the part of it that is wanted; no more is read of a block that is there
        """
        stop = None if size is None else first + size
        path = self._folder / "blocks" / name
        found = self._read(path, first, size)
        if found is not None:
            return found
        turn = int(hashlib.sha256(name.encode()).hexdigest(), 16) % NUM_LOCKS
        with self._lock(f"{turn:03d}"):
            found = self._read(path, first, size)
            if found is not None:
                return found
            data = fetch()
            self._put(path, data)
            return data[first:stop]

    def forget(self, name: str) -> None:
        """Removes a block that turned out to be damaged."""
        (self._folder / "blocks" / name).unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return sum(size for _, size, _ in self._entries())

    def _read(self, path: Path, first: int, size: int | None) -> bytes | None:
        try:
            with path.open("rb") as file:
                file.seek(first)
                data = file.read(-1 if size is None else size)
        except FileNotFoundError:
            return None
        now = time.monotonic()
        if now - self._touched.get(path.name, -TOUCH_S) >= TOUCH_S:
            if len(self._touched) > 1 << 16:
                self._touched.clear()
            self._touched[path.name] = now
            with suppress(FileNotFoundError):
                os.utime(path)
        return data

    def _put(self, path: Path, data: bytes) -> None:
        """Writes a block and makes room for it. A disk that is full costs speed, not the run."""
        if len(data) > self._max_bytes:
            return
        with self._lock("total"):
            self._make_room(len(data))
            with (
                suppress(OSError),
                tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file,
            ):
                try:
                    file.write(data)
                    file.flush()
                    Path(file.name).replace(path)
                except OSError:
                    Path(file.name).unlink(missing_ok=True)
                    raise

    def _make_room(self, num_bytes: int) -> None:
        entries = list(self._entries())
        total = sum(size for _, size, _ in entries)
        if total + num_bytes <= self._max_bytes:
            return
        limit = min(KEEP_SHARE * self._max_bytes, self._max_bytes - num_bytes)
        for _, size, path in sorted(entries):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of every block; leftovers of killed processes are removed."""
        for entry in os.scandir(self._folder / "blocks"):
            with suppress(FileNotFoundError):
                found = entry.stat()
                if not entry.name.startswith(".part-"):
                    yield found.st_mtime, found.st_size, Path(entry.path)
                elif time.time() - found.st_mtime > STALE_S:
                    Path(entry.path).unlink()

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        descriptor = os.open(
            self._folder / "locks" / name,
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
