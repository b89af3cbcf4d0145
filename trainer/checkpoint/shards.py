"""Tensors to files and back: the only importer of torch.distributed.checkpoint (DCP).

Files are hashed as their bytes are handed to the system, so that the digest is of what was meant
to be written, not of what a failing disk made of it.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from kinodit.trainer.checkpoint import folder as disk
from kinodit.trainer.checkpoint.manifest import BlockDigest, FileRecord
from kinodit.trainer.checkpoint.restricted import read_index
from kinodit.trainer.state import CheckpointError


class ShardError(CheckpointError):
    """Tensors could not be written or read; `disk_full` if that was the reason."""


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    group: ProcessGroup | None,
    reach: Callable[[str], None],
) -> dict[str, FileRecord]:
    """Write every rank's parts into `folder`, synced; this rank's files with their digests.

    Collective over `group`; alone without one. reach: called with the name of each point passed.

    Raises:
        ShardError: on every rank, if any could not write.
    """
    writer = _Writer(folder, reach)
    _alone_on_purpose()
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        raise ShardError(_reason(error)) from error
    return writer.files.records


def read_shards(path: Path, tensors: Mapping[str, Tensor], *, alone: bool) -> None:
    """Read a checkpoint's files into `tensors`, in place, whatever the layout. Collective.

    Raises:
        ShardError: an entry is missing, has another shape, or cannot be read.
    """
    _alone_on_purpose()
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(path), no_dist=alone)
    except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as error:
        raise ShardError(_reason(error)) from error


class _Writer(dcp.FileSystemWriter):
    """DCP's, through files that hash what is written."""

    def __init__(self, folder: Path, reach: Callable[[str], None]) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True)
        self.files = _HashingFiles(reach)
        self.fs = self.files
        self._reach = reach

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """See `StorageWriter`."""
        self._reach("checkpoint:before-shards")
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch hides what the system said behind an error about a position in the file.
            raise self.files.failure or error from error


class _Reader(dcp.FileSystemReader):
    """DCP's, with an index that is read without executing anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `StorageReader`."""
        metadata: Metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _HashingFiles(FileSystem):
    """Files whose size and digest are known when they are closed, by their final names."""

    def __init__(self, reach: Callable[[str], None]) -> None:
        self.records: dict[str, FileRecord] = {}
        self.failure: OSError | None = None
        self._reach = reach

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """See `FileSystemBase`."""
        assert mode == "wb", mode
        with Path(path).open("xb") as raw:
            stream = _HashingStream(raw, self._reach)
            try:
                yield cast(io.IOBase, stream)
                raw.flush()
            except OSError as error:
                self.failure = error
                raise
            except RuntimeError:
                self.failure = stream.failure
                raise
            self.records[Path(path).name] = stream.digest.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """See `FileSystemBase`: the index is written under a name of its own first."""
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashingStream:
    """A file that can only grow, with the digest of what it was given."""

    def __init__(self, raw: io.BufferedWriter, reach: Callable[[str], None]) -> None:
        self._raw = raw
        self._reach = reach
        self.digest = BlockDigest()
        self.failure: OSError | None = None
        self.flush = self.close = raw.flush  # whoever opened it closes it
        self.fileno = raw.fileno

    def write(self, data: Any) -> int:
        """Write all of `data`; its length in bytes."""
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
            if not self.digest.size:
                self._raw.flush()
                self._reach("checkpoint:inside-shard")
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.digest.size


def _reason(error: BaseException) -> str:
    """What went wrong, on one line; DCP's own error is a traceback of every rank."""
    if isinstance(error, dcp.CheckpointException):
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        return "; ".join(f"rank {rank}: {_one_line(cause)}" for rank, cause in causes.items())
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__} "
    return kind + disk.reason(error)


def _alone_on_purpose() -> None:
    """Without DCP's warning that a single process is saving: it is what was asked for.

    Never undone: another thread may be within a scope of its own for warnings.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
