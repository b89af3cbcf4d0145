"""Datasets without an index, streamed through webdataset: usable, and not exact.

The plan counts their samples as if there were so many as the recipe says; whatever place it gives
one, the next sample of the stream takes it. Which samples a run sees, and how often, therefore
depends on its ranks, threads and restarts. Whoever uses such a dataset has to say so
(`Dataset.is_exact`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from kinodit.data.archive_stream import COMPRESSED, PLAIN, archive_samples
from kinodit.data.braces import BraceError, expanded
from kinodit.data.config import DatasetConfig, StorageConfig
from kinodit.data.index import INDEX_DTYPE, Row
from kinodit.data.manifest import PIECE_SAMPLES, Dataset, Manifest, Piece, ShardEntry
from kinodit.data.reader import SampleError, ShardError
from kinodit.data.record import MODALITIES, Record, RecordError, parse_record
from kinodit.data.remote import Traffic
from kinodit.data.row_facts import FLAG_AUDIO
from kinodit.data.spec import PlanError
from kinodit.data.storage import is_remote, open_storage

Pipeline = Callable[[], Iterable[Mapping[str, Any]]]
"""Makes an iterable of webdataset samples (`__key__` and the bytes of each member), such as a
`webdataset.DataPipeline`."""


class StreamedDataset(Dataset):
    """A dataset of which nothing is known but what the recipe says of all its samples.

    Raises PlanError for names that are no archives.
    """

    def __init__(
        self,
        name: str,
        config: DatasetConfig,
        storage: StorageConfig | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        """A stream of the recipe's archives; in one's own program, of what `pipeline` makes."""
        self.storage = storage or StorageConfig()
        self.directory = Path(config.path)
        self.url = config.path.rstrip("/") if is_remote(config.path) else ""
        self.config = config.stream
        self.pipeline = pipeline
        try:
            self.archives = tuple(expanded(config.stream.shards))
        except BraceError as error:
            raise PlanError(f"data.datasets.{name}.stream.shards: {error}") from error
        for archive in self.archives:
            if not archive.endswith((*COMPRESSED, PLAIN)) or Path(archive).name != archive:
                raise PlanError(
                    f"data.datasets.{name}.stream.shards: {archive!r} is not the name of an "
                    f"archive ({', '.join((PLAIN, *COMPRESSED))}) directly below its path"
                )
        self._row = Row(
            offset=0,
            size=0,
            num_frames=0,
            height=0,
            width=0,
            fps_milli=0,
            duration_ms=0,
            caption_chars=0,
            modality=MODALITIES.index(self.config.modality),
            flags=FLAG_AUDIO if self.config.has_audio else 0,
            crc32=0,
        )
        said = "\n".join(["stream", *self.archives, str(self.config)])
        digest = hashlib.sha256(said.encode()).hexdigest()
        whole = ShardEntry("stream, not exact", self.config.num_samples, 0, digest, digest)
        self.manifest = Manifest(name, (whole,), digest)

    @property
    def is_exact(self) -> bool:
        """False: nobody can say which sample comes when."""
        return False

    def __len__(self) -> int:
        return self.config.num_samples

    def found(self, index: int) -> tuple[ShardEntry, Row]:
        """The stream as a whole, and what is planned for any sample, at the place it has there."""
        return self.manifest.shards[0], self._row._replace(offset=index)

    def shard_of(self, index: int) -> ShardEntry:
        """The stream as a whole."""
        return self.manifest.shards[0]

    def pieces(self) -> Iterator[Piece]:
        """Rows that are all the same."""
        for first in range(0, len(self), PIECE_SAMPLES):
            count = min(PIECE_SAMPLES, len(self) - first)
            yield Piece(first, np.full(count, np.array(tuple(self._row), INDEX_DTYPE)))

    def column(self, name: str) -> NDArray[Any]:
        """One field of `INDEX_DTYPE`: the same for all samples."""
        return np.full(len(self), getattr(self._row, name), INDEX_DTYPE[name])


class StreamReader:
    """Gives the next sample of a stream, whichever is asked for. Threads share it."""

    def __init__(self, dataset: StreamedDataset, seed: int, part: int) -> None:
        """The stream of data-parallel rank `part`: another order on each, drawn by `seed`."""
        self.dataset = dataset
        self._storage = open_storage(dataset.url) if dataset.url else None
        self._lock = Lock()
        self.traffic = Traffic()
        buffer = dataset.config.shuffle_buffer
        stages: list[Any] = [self._of_pipeline]
        if dataset.pipeline is None:
            stages = [
                webdataset.ResampledShards(
                    list(dataset.archives), seed=seed, worker_seed=lambda: part, deterministic=True
                ),
                self._opened,
                webdataset.shuffle(buffer, initial=min(buffer, 64), seed=seed * 65_537 + part),
            ]
        self._samples: Iterator[Record | SampleError] = iter(webdataset.DataPipeline(*stages))

    def read(self, index: int) -> Record:
        """The next record; `index` is not looked at.

        Raises:
            SampleError: it, or the rest of its archive, cannot be read.
            ShardError: there is no sample in the whole stream.
        """
        with self._lock:
            found = next(self._samples, None)
        if found is None:
            raise ShardError(f"the stream of dataset {self.dataset.name!r} has no samples")
        if isinstance(found, SampleError):
            raise found
        return found

    def close(self) -> None:
        """Ends connections."""
        if self._storage is not None:
            self._storage.close()

    def _opened(self, chosen: Iterator[Mapping[str, str]]) -> Iterator[Record | SampleError]:
        dataset = self.dataset
        for row in chosen:
            name = row["url"]
            where = f"{dataset.url}/{name}" if dataset.url else str(dataset.directory / name)
            yield from archive_samples(name, where, self._storage, dataset.storage)

    def _of_pipeline(self) -> Iterator[Record | SampleError]:
        assert self.dataset.pipeline is not None
        while True:
            is_empty = True
            for sample in self.dataset.pipeline():
                is_empty = False
                yield _of_webdataset(sample)
            if is_empty:
                return


def _of_webdataset(sample: Mapping[str, Any]) -> Record | SampleError:
    """A sample of webdataset's as a record. Keys of its own begin with two underscores."""
    key = str(sample.get("__key__", ""))
    members = {
        name: value.encode() if isinstance(value, str) else value
        for name, value in sample.items()
        if not name.startswith("__")
    }
    other = next((name for name, value in members.items() if not isinstance(value, bytes)), None)
    if other is not None:
        return SampleError(
            f"sample {key[:160]!r}: its {other} is a {type(members[other]).__name__}; media are "
            "decoded here, so leave out stages that decode (`.decode()`)",
            key[:128],
        )
    try:
        return parse_record(key.rpartition("/")[2], members)
    except RecordError as error:
        return SampleError(f"{sample.get('__url__', 'its pipeline')}: {error}", key[:128])
