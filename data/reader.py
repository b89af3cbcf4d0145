"""Random access to the samples of a dataset: one read at a known offset, checked, then parsed."""

from __future__ import annotations

import os
from os import pread
from pathlib import Path
from threading import Lock

from kinodit.data.checksums import crc32
from kinodit.data.index import read_sample
from kinodit.data.manifest import Dataset
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
        shard, offset, size, indexed = self.dataset.place(index)
        if offset + size > shard.num_bytes:
            # Nothing is set aside for what an index may claim.
            raise SampleError(
                f"{self._where(index)} cannot lie there: its index says {size} bytes, and the "
                f"shard ends at {shard.num_bytes}. Run `kinodit data index` to write it anew"
            )
        try:
            if self._remote is not None:
                span = self._remote.read(shard, offset, size)
            else:
                file = self._files.get(shard.file) or self._files.open(shard.file)
                span = pread(file.descriptor, size, offset)
                if len(span) < size:
                    span = self._rest(file.descriptor, span, index)
        except StorageError as error:
            raise ShardError(f"{self._where(index)} cannot be read: {error}") from error
        except OSError as error:
            raise ShardError(
                f"{self._where(index)} cannot be read: {error.strerror or error}. Put the shard "
                "back, or correct the dataset's path"
            ) from error
        checksum = crc32(span)
        if checksum != indexed and self._remote is not None:
            # Damaged on its way, or where it was kept: what the storage says now decides.
            span = self._remote.read_again(shard, offset, size)
            checksum = crc32(span)
        if checksum != indexed:
            raise SampleError(
                f"{self._where(index)} was changed after it was indexed: its {size} bytes have "
                f"CRC-32 {checksum:08x}, the index says {indexed:08x}. Restore the shard, or run "
                "`kinodit data validate` to see what is damaged",
                readable_key(span),
            )
        try:
            return read_sample(span)
        except (TarError, RecordError) as error:
            raise SampleError(
                f"{self._where(index)} breaks the record contract: {error}", readable_key(span)
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

    def _where(self, index: int) -> str:
        shard, offset, _ = self.dataset.span(index)
        place = self.dataset.place_of(shard)
        return f"{place}: sample {index} of dataset {self.dataset.name!r} at byte {offset}"

    def _rest(self, descriptor: int, first: bytes, index: int) -> bytes:
        """The bytes of sample `index`, of which a read gave only the first."""
        _, offset, size = self.dataset.span(index)
        pieces, found = [first], len(first)
        while found < size:
            piece = os.pread(descriptor, size - found, offset + found)
            if not piece:
                raise SampleError(
                    f"{self._where(index)} is cut off: expected {size} bytes, found {found}; the "
                    f"file has {os.fstat(descriptor).st_size} bytes, and the sample ends at "
                    f"{offset + size}. Copy the shard anew"
                )
            pieces.append(piece)
            found += len(piece)
        return b"".join(pieces)


def readable_key(span: bytes) -> str:
    """The key that a damaged sample's first header still shows; "" if that is none."""
    name = span[:100].split(b".", 1)[0].decode(errors="replace")
    return name if KEY_PATTERN.fullmatch(name) else ""


class _OpenFile:
    """A file open for reading, closed once nobody refers to it.

    Whoever reads holds on to it: a descriptor closed under a reader may be reopened by another
    thread as another file, and the read would return that file's bytes.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _FileCache:
    """Open files of a folder by name, at most `max_open`; the one opened first is let go first."""

    def __init__(self, folder: Path, max_open: int) -> None:
        self._folder = folder
        self._max_open = max_open
        self._files: dict[str, _OpenFile] = {}
        self._lock = Lock()
        # Looking one up needs no lock: it is one step of the interpreter.
        self.get = self._files.get

    def open(self, name: str) -> _OpenFile:
        """The file, opened if no other thread has done so meanwhile."""
        with self._lock:
            if name not in self._files:
                file = _OpenFile(os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC))
                while len(self._files) >= self._max_open:
                    del self._files[next(iter(self._files))]
                self._files[name] = file
            return self._files[name]

    def close(self) -> None:
        """Lets go of all files: each is closed once no thread is reading it."""
        with self._lock:
            self._files.clear()
