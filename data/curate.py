"""Scores for a small dataset: a copy of it whose records say what was measured of each medium.

Scores are where filters look for them, so that the copy is trained on like any other dataset. The
media are the same bytes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError
from kinodit.data.index import known_meta
from kinodit.data.manifest import Dataset, Manifest
from kinodit.data.ocr import TextDetector
from kinodit.data.probe import MediumError
from kinodit.data.reader import SampleError, ShardReader
from kinodit.data.record import Record
from kinodit.data.scores import Measured, measure
from kinodit.data.writer import DEFAULT_SHARD_BYTES, DatasetWriter
from kinodit.models.errors import UserError

LIMITS = DecodeConfig(decode_limit_s=600.0)


class CurateError(UserError):
    """A dataset that cannot be measured."""


@dataclass(frozen=True)
class CurateReport:
    """manifest: of the copy; left_out: (sample, why) of what has no scores and is not in it."""

    manifest: Manifest
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Found:
    """What a process says of one sample."""

    key: str
    measured: Measured | None = None
    reason: str = ""


def curate(
    source: Path | str,
    destination: Path | str,
    *,
    with_text: bool = False,
    workers: int = 2,
    name: str = "",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CurateReport:
    """Writes `destination`: the samples of `source` with what `kinodit.data.scores` measures.

    A score that a record has already is measured anew. Times of shot cuts are in `extra.cuts_s`.

    Args:
        source: a dataset on a file system.
        destination: a folder that does not exist, or is empty.
        with_text: also how much of the picture is text.
        workers: processes that measure.
        name: of the copy; that of its folder by default.
        shard_bytes: length of its shards, about.
        progress: called with (samples done, samples).

    Raises:
        CurateError: a process died, or none is asked for.
        ManifestError, WriterError: the source or the destination cannot be used.
        MissingExtraError: `with_text`, and its detector is not installed.
    """
    if workers < 1:
        raise CurateError(f"{workers} workers measure nothing: at least 1 is needed")
    dataset = Dataset(source)
    if with_text:
        TextDetector()
    left_out: list[tuple[str, str]] = []
    reader = ShardReader(dataset)
    with DatasetWriter(destination, name, shard_bytes) as writer:
        for index, found in enumerate(_measured(dataset, with_text, workers)):
            if found.measured is None:
                left_out.append((found.key or f"sample {index}", found.reason))
            else:
                writer.write(_scored(reader.read(index), found.measured))
            progress(index + 1, len(dataset))
    reader.close()
    return CurateReport(Manifest.load(Path(destination)), tuple(left_out))


def _measured(dataset: Dataset, with_text: bool, workers: int) -> Iterator[_Found]:
    """What is found of each sample, in their order."""
    work = [(str(dataset.directory), index, with_text) for index in range(len(dataset))]
    if workers == 1:
        yield from map(_measure_one, work)
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context)
    try:
        yield from pool.map(_measure_one, work, chunksize=4)
    except BrokenProcessPool as error:
        raise CurateError(
            "a process that measured died, of a medium that crashes its decoder or for want of "
            "memory: `kinodit data validate --decode` and --workers 1 show which"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _measure_one(job: tuple[str, int, bool]) -> _Found:
    directory, index, with_text = job
    try:
        record = _reader(directory).read(index)
    except SampleError as error:
        return _Found(error.key, reason=str(error))
    try:
        known_meta(record)
        return _Found(record.key, measure(record, LIMITS, _detector() if with_text else None))
    except (DecodeError, MediumError) as error:
        return _Found(record.key, reason=str(error))


def _scored(record: Record, measured: Measured) -> Record:
    meta = known_meta(record)
    extra = {name: value for name, value in meta.extra.items() if name != "cuts_s"}
    if measured.cuts_s:
        extra["cuts_s"] = " ".join(f"{time_s:.3f}" for time_s in measured.cuts_s)
    scores = {name: round(value, 6) for name, value in measured.scores.items()}
    meta = replace(meta, scores={**meta.scores, **scores}, extra=extra)
    return replace(record, meta=meta)


@lru_cache(1)
def _reader(directory: str) -> ShardReader:
    return ShardReader(Dataset(directory))


@lru_cache(1)
def _detector() -> TextDetector:
    return TextDetector()
