"""Encoding a dataset into a cache, in parts: `kinodit data encode`.

A part is every n-th shard of the source. A shard of the cache is there whole or not at all, so that
a part that was interrupted goes on with the shard it was at. Whoever finishes the last shard writes
the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from kinodit.data.latents import CacheHeader, Encoded, Origin, StaleCacheError
from kinodit.data.manifest import Dataset, Manifest, ShardEntry
from kinodit.data.record import Record, RecordMeta, encode_record
from kinodit.data.spec import DatasetSpec
from kinodit.data.writer import ShardFile, WriterError, sample_bytes

Encode = Callable[[int], tuple[str, RecordMeta, Encoded] | str]
"""Sample number -> (key, metadata, what it was encoded to), or why it cannot be."""


@dataclass(frozen=True)
class EncodeReport:
    """What a part did: samples encoded, shards that were there already, what was left out.

    is_complete: whether all shards are there, so that the cache can be used
    """

    num_encoded: int
    num_kept: int
    left_out: tuple[str, ...]
    is_complete: bool


def encode_shards(
    directory: Path,
    dataset: Dataset,
    spec: DatasetSpec,
    origin: Origin,
    encode: Encode,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EncodeReport:
    """Encodes one part of a dataset into `directory`.

    spec: which samples take part; the others are left out without a word

    Raises:
        StaleCacheError: what is there was made of something else.
        WriterError: the disk refuses a write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *(shard.num_samples for shard in dataset.manifest.shards)])
    mine = range(part[0], len(dataset.manifest.shards), part[1])
    total = sum(dataset.manifest.shards[number].num_samples for number in mine)
    done = num_encoded = num_kept = 0
    left_out: list[str] = []
    for number in mine:
        first, end = int(starts[number]), int(starts[number + 1])
        if _load(directory, number, origin) is not None:
            num_kept += 1
            done += end - first
            progress(done, total)
            continue
        with _shard(directory, number, origin) as shard:
            for index in range(first, end):
                if _takes_part(spec, index):
                    found = encode(index)
                    if isinstance(found, str):
                        left_out.append(found)
                    else:
                        shard.add(index, *found)
                        num_encoded += 1
                done += 1
                progress(done, total)
    complete = _finish(directory, dataset, origin)
    return EncodeReport(num_encoded, num_kept, tuple(left_out), complete)


def _takes_part(spec: DatasetSpec, index: int) -> bool:
    return spec.eligible is None or index in spec.eligible


class _CacheShard:
    """One shard being written; the samples that are in it."""

    def __init__(self, path: Path) -> None:
        self._file = ShardFile(path)
        self.present: list[int] = []

    def add(self, index: int, key: str, meta: RecordMeta, encoded: Encoded) -> None:
        """Appends what sample `index` was encoded to."""
        # The digests are of members that are not here.
        record = Record(key, structs.replace(meta, sha256={}), encoded.to_members(meta))
        self._file.append(record, sample_bytes(encode_record(record)))
        self.present.append(index)

    def close(self) -> ShardEntry:
        """Ends the archive."""
        return self._file.close()

    def abandon(self) -> None:
        """Lets go of the file."""
        self._file.abandon()


@contextmanager
def _shard(directory: Path, number: int, origin: Origin) -> Iterator[_CacheShard]:
    """Writes shard `number` under a hidden name, and gives it its own when the block ends well."""
    hidden = directory / f".partial-{number:06d}-{os.getpid()}"
    hidden.mkdir(exist_ok=True)
    shard = _CacheShard(hidden / f"{number:06d}.tar")
    try:
        yield shard
        entry = shard.close()
        for name in (entry.index_file, entry.file):
            (hidden / name).replace(directory / name)
        document = {"entry": asdict(entry), "present": shard.present, "origin": asdict(origin)}
        (hidden / "note").write_text(json.dumps(document))
        # Last: a shard counts once its note is there.
        (hidden / "note").replace(_note(directory, number))
    finally:
        shard.abandon()
        shutil.rmtree(hidden, ignore_errors=True)


def _note(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.part.json"


def _load(directory: Path, number: int, origin: Origin) -> tuple[ShardEntry, list[int]] | None:
    """A finished shard's entry, and the samples that it has."""
    try:
        document = json.loads(_note(directory, number).read_bytes())
    except FileNotFoundError:
        return None
    before = Origin(**document["origin"])
    differences = before.differences(origin)
    if differences:
        raise StaleCacheError(
            f"{directory} holds parts of another cache: {'; '.join(differences)}. Choose another "
            "folder, or remove it"
        )
    return ShardEntry(**document["entry"]), list(document["present"])


def _finish(directory: Path, dataset: Dataset, origin: Origin) -> bool:
    """Writes manifest and header if every shard is there. Any part may: it comes out alike."""
    parts = []
    for number in range(len(dataset.manifest.shards)):
        part = _load(directory, number, origin)
        if part is None:
            return False
        parts.append(part)
    if not any(present for _, present in parts):
        raise WriterError(f"{directory} would be empty: no sample could be encoded")
    here = np.zeros(len(dataset), dtype=np.bool_)
    for _, present in parts:
        here[present] = True
    Manifest.of(f"{dataset.name}-encoded", [entry for entry, _ in parts]).save(directory)
    CacheHeader(origin, tuple(_runs(~here))).save(directory)
    return True


def _runs(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield first, end - first
