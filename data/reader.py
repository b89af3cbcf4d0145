"""Random access to the samples of a dataset: one read at a known offset, checked, then parsed."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from kinodit.data.index import read_span, spans
from kinodit.data.manifest import Dataset, ShardEntry
from kinodit.data.record import KEY_PATTERN, Record, RecordError
from kinodit.data.remote import RemoteShards, Traffic
from kinodit.data.storage import StorageError
from kinodit.data.tar import TarError
from kinodit.models.errors import UserError


class ShardError(UserError):
    """A shard that cannot be read, or is not what its index says; names file, sample and bytes."""


class SampleError(ShardError):
    """One sample whose bytes are not those that were indexed, or break the record contract.

    key: of the sample, as far as it can still be read; "" otherwise
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ShardReader:
    """Reads samples of one dataset. Threads may share a reader; at most `max_open` files are open.

    A shard is never read as a stream: a damaged sample is an error for that sample and hides no
    other, and the order of reading is free.
    """

    def __init__(self, dataset: Dataset, max_open: int = 32) -> None:
        self.dataset = dataset
        self._files = _FileCache(max_open)
        self._remote = None
        if dataset.url:
            self._remote = RemoteShards(dataset.url, dataset.storage)

    def read(self, index: int) -> Record:
        """The record of sample `index`. Nothing in it is decoded or unpickled.

        Raises:
            SampleError: the shard is cut off before the sample's end, the bytes are not those that
                were indexed, or they are not exactly one sample of the record contract.
            ShardError: the shard is missing or its storage does not answer.
        """
        shard, offset, size = self.dataset.span(index)

        def where() -> str:
            place = self.dataset.place_of(shard)
            return f"{place}: sample {index} of dataset {self.dataset.name!r} at byte {offset}"

        expected = self.dataset.row(index).crc32
        if offset + size > shard.num_bytes:
            # Nothing is set aside for what an index may claim.
            raise SampleError(
                f"{where()} cannot lie there: its index says {size} bytes, and the shard ends at "
                f"{shard.num_bytes}. Run `kinodit data index` to write it anew"
            )
        span = self._read(shard, offset, size, where)
        checksum = zlib.crc32(span)
        if checksum != expected and self._remote is not None:
            # Damaged on its way, or where it was kept: what the storage says now decides.
            span = self._remote.read_again(shard, offset, size)
            checksum = zlib.crc32(span)
        if checksum != expected:
            raise SampleError(
                f"{where()} was changed after it was indexed: its {size} bytes have CRC-32 "
                f"{checksum:08x}, the index says {expected:08x}. Restore the shard, or run "
                "`kinodit data validate` to see what is damaged",
                readable_key(span),
            )
        try:
            found = list(spans(span, whole=False))
            if len(found) != 1:
                raise RecordError(f"these bytes hold {len(found)} samples, not one")
            return read_span(span, found[0])
        except (TarError, RecordError) as error:
            raise SampleError(
                f"{where()} breaks the record contract: {error}", readable_key(span)
            ) from error

    @property
    def traffic(self) -> Traffic:
        """What was fetched from elsewhere; nothing where the shards are here."""
        return self._remote.traffic if self._remote is not None else Traffic()

    def close(self) -> None:
        """Closes all files that no other thread is reading."""
        self._files.close()
        if self._remote is not None:
            self._remote.close()

    def _read(self, shard: ShardEntry, offset: int, size: int, where: Callable[[], str]) -> bytes:
        try:
            if self._remote is not None:
                return self._remote.read(shard, offset, size)
            with self._files.open(self.dataset.directory / shard.file) as descriptor:
                return _read_exactly(descriptor, offset, size, where)
        except StorageError as error:
            raise ShardError(f"{where()} cannot be read: {error}") from error
        except OSError as error:
            raise ShardError(
                f"{where()} cannot be read: {error.strerror or error}. Put the shard back, or "
                "correct the dataset's path"
            ) from error


def readable_key(span: bytes) -> str:
    """The key that a damaged sample's first header still shows; "" if that is none."""
    name = span[:100].split(b".", 1)[0].decode(errors="replace")
    return name if KEY_PATTERN.fullmatch(name) else ""


def _read_exactly(descriptor: int, offset: int, size: int, where: Callable[[], str]) -> bytes:
    pieces: list[bytes] = []
    missing = size
    while missing:
        piece = os.pread(descriptor, missing, offset + size - missing)
        if not piece:
            raise SampleError(
                f"{where()} is cut off: expected {size} bytes, found {size - missing}; the file "
                f"has {os.fstat(descriptor).st_size} bytes, and the sample ends at "
                f"{offset + size}. Copy the shard anew"
            )
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass
class _OpenFile:
    descriptor: int
    num_users: int = 0


class _FileCache:
    """File descriptors by path, the longest unused closed first, none while it is in use.

    The count matters: a descriptor closed under a reader may be reopened by another thread as
    another file, and the read would return that file's bytes.
    """

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._files.move_to_end(path)
            file.num_users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.num_users -= 1
                self._shrink(self._max_open)

    def close(self) -> None:
        with self._lock:
            self._shrink(0)

    def _shrink(self, limit: int) -> None:
        if len(self._files) <= limit:
            return
        unused = [path for path, file in self._files.items() if not file.num_users]
        for path in unused[: len(self._files) - limit]:
            os.close(self._files.pop(path).descriptor)
