"""Writing datasets: shards, their indexes and the manifest, whole or not at all.

Everything is written into a hidden folder beside the destination, which takes the destination's
name when the last byte is on disk: a reader never sees half a dataset. The same records give the
same bytes: members carry no time, owner or mode of their own.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from kinodit.data.index import INDEX_DTYPE, Row, index_row
from kinodit.data.manifest import Manifest, ShardEntry
from kinodit.data.record import Record, RecordError, encode_record
from kinodit.models.errors import UserError

DEFAULT_SHARD_BYTES = 256 << 20
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


class WriterError(UserError):
    """A dataset that cannot be written: disk full, destination in use, no permission."""


class DatasetWriter:
    """Writes records into shards of about `shard_bytes` each. Use it as a context manager.

    Leaving the block normally publishes the dataset at `directory`, under the folder's name if it
    is given no other; an exception removes what was written. A shard is closed before the sample
    that would make it longer than `shard_bytes`.

    Raises WriterError if `directory` exists and is not empty, or when the disk refuses a write.
    """

    def __init__(
        self, directory: Path | str, name: str = "", shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._directory = Path(directory).absolute()
        if self._directory.is_file() or (
            self._directory.is_dir() and any(self._directory.iterdir())
        ):
            raise WriterError(
                f"{self._directory} exists and is not an empty folder: choose another destination "
                "or remove it first"
            )
        self._name = name or self._directory.name
        self._shard_bytes = shard_bytes
        self._partial = self._directory.parent / f".{self._directory.name}.partial-{os.getpid()}"
        self._entries: list[ShardEntry] = []
        self._shard: ShardFile | None = None
        self._keys: set[str] = set()
        self.num_bytes = 0

    def __enter__(self) -> Self:
        with disk_errors(self._partial):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._keys)

    def write(self, record: Record) -> None:
        """Appends one record. Raises RecordError for an invalid one or a key used before."""
        if record.key in self._keys:
            raise RecordError(f"sample key {record.key!r} occurs twice; keys must be unique")
        data = sample_bytes(encode_record(record))
        self._keys.add(record.key)
        if self._shard is not None and self._shard.num_bytes + len(data) > self._shard_bytes:
            self._close_shard()
        if self._shard is None:
            path = self._partial / f"{len(self._entries):06d}.tar"
            with disk_errors(path):
                self._shard = ShardFile(path)
        with disk_errors(self._shard.path):
            self._shard.append(record, data)
        self.num_bytes += len(data)

    def _close_shard(self) -> None:
        if self._shard is not None:
            with disk_errors(self._shard.path):
                self._entries.append(self._shard.close())
            self._shard = None

    def _publish(self) -> None:
        self._close_shard()
        if not self._entries:
            raise WriterError(f"nothing to write to {self._directory}: there are no samples")
        with disk_errors(self._directory):
            Manifest.of(self._name, self._entries).save(self._partial)
            self._partial.rename(self._directory)


class ShardFile:
    """One shard being written; hashes it on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._rows: list[Row] = []

    def append(self, record: Record, data: bytes) -> None:
        """Appends a record, of which `data` are the bytes (`sample_bytes`)."""
        self._rows.append(index_row(record.meta, self.num_bytes, memoryview(data)))
        self._put(data)

    def close(self) -> ShardEntry:
        """Ends the archive, writes its index, and syncs both to the disk."""
        self._put(_END_OF_ARCHIVE)
        _sync(self._file)
        index = np.array(self._rows, dtype=INDEX_DTYPE).tobytes()
        entry = ShardEntry(
            file=self.path.name,
            num_samples=len(self._rows),
            num_bytes=self.num_bytes,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        with (self.path.parent / entry.index_file).open("wb") as file:
            file.write(index)
            _sync(file)
        self._file.close()
        return entry

    def abandon(self) -> None:
        """Closes the file, whatever the disk says."""
        # The file may hold buffered bytes that the full disk refuses once more.
        try:
            self._file.close()
        except OSError:
            self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sample_bytes(sample: Mapping[str, str | bytes]) -> bytes:
    """A WebDataset sample (`__key__` and members) as adjacent tar members, without an end marker.

    USTAR, and a PAX header where a name is longer than USTAR's 100 bytes. Members are in the order
    of their names.
    """
    stream = io.BytesIO()
    for extension in sorted(sample):
        payload = sample[extension]
        if extension == "__key__" or isinstance(payload, str):
            continue
        header = tarfile.TarInfo(f"{sample['__key__']!s}.{extension}")
        header.size = len(payload)
        stream.write(header.tobuf(tarfile.PAX_FORMAT))
        stream.write(payload)
        stream.write(bytes(-len(payload) % tarfile.BLOCKSIZE))
    return stream.getvalue()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a file system may refuse into a WriterError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriterError(
                f"the disk is full: {path} could not be written. Nothing was kept; free some "
                "space or choose another destination"
            ) from error
        raise WriterError(f"{path} cannot be written: {error.strerror or error}") from error
