"""Datasets that lie elsewhere: manifest and indexes are copied once, samples read by offset."""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

from kinodit.data.config import StorageConfig
from kinodit.data.manifest import MANIFEST_FILE, Dataset, Manifest, ShardEntry
from kinodit.data.shard_cache import BlockCache
from kinodit.data.storage import StorageError, TransientError, is_remote, open_storage

T = TypeVar("T")
MIB, GIB = 1 << 20, 1 << 30
NUM_INDEX_THREADS = 16


@dataclass
class Traffic:
    """Bytes that were fetched, bytes of samples that were used, and reads that were tried again."""

    fetched_bytes: int = 0
    used_bytes: int = 0
    num_retries: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.fetched_bytes + other.fetched_bytes,
            self.used_bytes + other.used_bytes,
            self.num_retries + other.num_retries,
        )

    @property
    def fetched_per_used(self) -> float | None:
        """Bytes that were fetched for each that was used; None if none came from elsewhere."""
        return self.fetched_bytes / self.used_bytes if self.used_bytes else None


class RemoteShards:
    """Reads bytes of the shards of one remote dataset. Threads share it."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.url = url.rstrip("/")
        self._config = config
        self._storage = open_storage(url)
        self._cache = None
        if config.cache_gib > 0:
            self._cache = BlockCache(config.folder / "shards", round(config.cache_gib * GIB))
        self.traffic = Traffic()
        self._lock = Lock()

    def read(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on.

        Raises:
            StorageError: they cannot be had, or not in `attempts` attempts.
        """
        with self._lock:
            self.traffic.used_bytes += size
        if self._cache is None:
            return self._fetch(shard, offset, size)
        length = round(self._config.block_mib * MIB)
        first, last = offset // length, (offset + size - 1) // length
        parts = []
        for number in range(first, last + 1):
            start = max(offset - number * length, 0)
            stop = min(offset + size - number * length, length)
            parts.append(self._part(shard, number, length, start, stop - start))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_again(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        """The same past the cache: for bytes that were damaged on their way or on the disk."""
        length = round(self._config.block_mib * MIB)
        for number in range(offset // length, (offset + size - 1) // length + 1):
            if self._cache is not None:
                self._cache.forget(_block_name(shard, number, length))
        with self._lock:
            self.traffic.num_retries += 1
        return self._fetch(shard, offset, size)

    def whole(self, name: str) -> bytes:
        """All bytes of a small file. Raises StorageError."""
        limit_s = self._config.attempt_limit_s
        return self._tried(name, lambda: self._storage.read_whole(name, limit_s))

    def close(self) -> None:
        """Ends connections."""
        self._storage.close()

    def _part(self, shard: ShardEntry, number: int, length: int, first: int, size: int) -> bytes:
        """`size` bytes of a block from its byte `first` on."""
        assert self._cache is not None
        start = number * length
        whole = min(length, shard.num_bytes - start)
        name = _block_name(shard, number, length)
        found = self._cache.block(name, lambda: self._fetch(shard, start, whole), first, size)
        if len(found) != size:
            self._cache.forget(name)
            return self._fetch(shard, start + first, size)
        return found

    def _fetch(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        limit_s = self._config.attempt_limit_s
        data = self._tried(
            shard.file, lambda: self._storage.read(shard.file, offset, size, limit_s)
        )
        with self._lock:
            self.traffic.fetched_bytes += size
        return data

    def _tried(self, name: str, read: Callable[[], T]) -> T:
        return retried(f"{self.url}/{name}", read, self._config, self._count_retry)

    def _count_retry(self) -> None:
        with self._lock:
            self.traffic.num_retries += 1


def retried(
    where: str,
    read: Callable[[], T],
    config: StorageConfig,
    again: Callable[[], None] = lambda: None,
) -> T:
    """What `read` returns, tried again with growing pauses while that may help.

    `again` is called before every further attempt.

    Raises:
        StorageError: it will not help, or `attempts` attempts did not.
    """
    pause_s = config.wait_s
    for attempt in range(1, config.attempts + 1):
        try:
            return read()
        except TransientError as error:
            if attempt == config.attempts:
                raise StorageError(
                    f"{where}: {attempt} attempts failed; the last one: {error}. "
                    "data.storage.attempts and attempt_limit_s say how long it is tried"
                ) from error
            again()
            # Spread, so that the ranks of a large run do not come back together.
            time.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, config.max_wait_s)
    raise AssertionError("attempts is at least 1")


def _block_name(shard: ShardEntry, number: int, length: int) -> str:
    """Named by contents: equal shards of two datasets share blocks, and no name becomes a path."""
    return f"{hashlib.sha256(shard.digest.encode()).hexdigest()}-{length}-{number}"


def open_dataset(place: str, config: StorageConfig) -> Dataset:
    """The dataset at `place`, a folder or a URL.

    Raises:
        ManifestError: it is no dataset, or its files are not what its manifest says.
        StorageError: it cannot be read.
    """
    if not is_remote(place):
        return Dataset(Path(place))
    shards = RemoteShards(place, config)
    try:
        text = shards.whole(MANIFEST_FILE)
        name = hashlib.sha256(text).hexdigest()
        folder = config.folder / "manifests" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _publish(folder / MANIFEST_FILE, text)

        def bring(shard: ShardEntry) -> None:
            path = folder / shard.index_file
            if not _is(path, shard.index_sha256):
                _publish(path, shards.whole(shard.index_file))

        # A store answers many requests at once, and each takes its time.
        with ThreadPoolExecutor(NUM_INDEX_THREADS, thread_name_prefix="index") as pool:
            for _ in pool.map(bring, Manifest.load(folder).shards):
                pass
    finally:
        shards.close()
    return Dataset(folder, shards.url, config)


def _is(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except FileNotFoundError:
        return False


def _publish(path: Path, data: bytes) -> None:
    """Writes a file whole: processes of the node may read it at the same time."""
    if path.is_file() and path.read_bytes() == data:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
