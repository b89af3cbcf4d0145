"""Random access to the samples of a dataset: one read at a known offset, checked, then parsed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from kinodit.data.checksums import crc32
from kinodit.data.index import read_sample
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
        self._files = _FileCache(dataset.directory, max_open)
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
        shard, row = self.dataset.found(index)
        offset, size = row.offset, row.size

        def where() -> str:
            place = self.dataset.place_of(shard)
            return f"{place}: sample {index} of dataset {self.dataset.name!r} at byte {offset}"

        if offset + size > shard.num_bytes:
            # Nothing is set aside for what an index may claim.
            raise SampleError(
                f"{where()} cannot lie there: its index says {size} bytes, and the shard ends at "
                f"{shard.num_bytes}. Run `kinodit data index` to write it anew"
            )
        span = self._read(shard, offset, size, where)
        checksum = crc32(span)
        if checksum != row.crc32 and self._remote is not None:
            # Damaged on its way, or where it was kept: what the storage says now decides.
            span = self._remote.read_again(shard, offset, size)
            checksum = crc32(span)
        if checksum != row.crc32:
            raise SampleError(
                f"{where()} was changed after it was indexed: its {size} bytes have CRC-32 "
                f"{checksum:08x}, the index says {row.crc32:08x}. Restore the shard, or run "
                "`kinodit data validate` to see what is damaged",
                readable_key(span),
            )
        try:
            return read_sample(span)
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
            file = self._files.take(shard.file)
            try:
                return _read_exactly(file.descriptor, offset, size, where)
            finally:
                self._files.give_back(file)
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
    """Open files of a folder by name, the longest unused closed first, none while it is in use.

    The count matters: a descriptor closed under a reader may be reopened by another thread as
    another file, and the read would return that file's bytes.
    """

    def __init__(self, folder: Path, max_open: int) -> None:
        self._folder = folder
        self._max_open = max_open
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def take(self, name: str) -> _OpenFile:
        """The file, which stays open until it is given back."""
        with self._lock:
            file = self._files.get(name)
            if file is None:
                descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
                file = self._files[name] = _OpenFile(descriptor)
            self._files.move_to_end(name)
            file.num_users += 1
        return file

    def give_back(self, file: _OpenFile) -> None:
        """Its user has read what it wanted."""
        with self._lock:
            file.num_users -= 1
            if len(self._files) > self._max_open:
                self._shrink(self._max_open)

    def close(self) -> None:
        with self._lock:
            self._shrink(0)

    def _shrink(self, limit: int) -> None:
        unused = [name for name, file in self._files.items() if not file.num_users]
        for name in unused[: len(self._files) - limit]:
            os.close(self._files.pop(name).descriptor)
