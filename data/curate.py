"""Scores for a small dataset: a copy of it whose records say what was measured of each medium.

Scores are where filters look for them, so that the copy is trained on like any other dataset. The
media are the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from msgspec import structs

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError, too_slow
from kinodit.data.index import known_meta
from kinodit.data.killable import Answer, CrashedError, HungError, KillableProcess, answers
from kinodit.data.manifest import Dataset, Manifest
from kinodit.data.ocr import TextDetector
from kinodit.data.probe import MediumError, MediumFacts
from kinodit.data.reader import SampleError, ShardReader
from kinodit.data.record import SCHEMA, Record, parse_meta
from kinodit.data.scores import measure
from kinodit.data.shots import Shots, require_shots
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


def curate(
    source: Path | str,
    destination: Path | str,
    *,
    with_text: bool = False,
    shots: Shots = "own",
    workers: int = 2,
    limits: DecodeConfig = LIMITS,
    name: str = "",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CurateReport:
    """Writes `destination`: the samples of `source` with what `kinodit.data.scores` measures.

    A score that a record has already is measured anew. Times of shot cuts are in `extra.cuts_s`.
    Media are opened in processes that can be killed: one that crashes its decoder, or hangs in it,
    is left out like others that are damaged.

    Args:
        source: a dataset on a file system.
        destination: a folder that does not exist, or is empty.
        with_text: also how much of the picture is text.
        shots: what finds shot cuts.
        workers: processes that measure.
        limits: of decoding; a medium may take `decode_limit_s`.
        name: of the copy; that of its folder by default.
        shard_bytes: length of its shards, about.
        progress: called with (samples done, samples).

    Raises:
        CurateError: no process is asked for.
        ManifestError, WriterError: the source or the destination cannot be used.
        MissingExtraError: what finds text, or cuts, is not installed.
    """
    if workers < 1:
        raise CurateError(f"{workers} workers measure nothing: at least 1 is needed")
    dataset = Dataset(source)
    if with_text:
        TextDetector()
    require_shots(shots)
    left_out: list[tuple[str, str]] = []
    reader = ShardReader(dataset)
    folder = str(dataset.directory)
    jobs = [_Job(folder, index, with_text, shots, limits) for index in range(len(dataset))]
    with (
        DatasetWriter(destination, name, shard_bytes) as writer,
        ThreadPoolExecutor(workers) as threads,
        _processes(workers) as ask,
        closing(_in_order(threads, ask, jobs)) as found,
    ):
        for index, said in enumerate(found):
            if "refused" in said:
                left_out.append((said["key"] or f"sample {index}", said["refused"]))
            else:
                writer.write(_scored(reader.read(index), said))
            progress(index + 1, len(dataset))
    reader.close()
    return CurateReport(Manifest.load(Path(destination)), tuple(left_out))


class _Job(NamedTuple):
    """What a process is asked: sample `number` of the dataset in a folder."""

    directory: str
    number: int
    with_text: bool
    shots: Shots
    limits: DecodeConfig


def _in_order(
    threads: ThreadPoolExecutor, ask: Callable[[_Job], Answer], jobs: list[_Job]
) -> Generator[Answer, None, None]:
    """What is said of each job, in their order; once it is closed, nothing more is begun."""
    try:
        yield from threads.map(ask, jobs)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _processes(count: int) -> Iterator[Callable[[_Job], Answer]]:
    """Gives what asks one of `count` processes that measure, and waits for it."""
    free: SimpleQueue[KillableProcess] = SimpleQueue()
    processes = [KillableProcess(_serve) for _ in range(count)]
    for process in processes:
        free.put(process)

    def ask(job: _Job) -> Answer:
        process = free.get()
        try:
            return process.ask(lambda link, pid, is_new: link.send(job), job.limits.decode_limit_s)
        except CrashedError:
            reason = "its decoder crashed, and did so again in a new process"
        except HungError:
            reason = f"{too_slow(job.limits)}: its decoder hung and was killed"
        finally:
            free.put(process)
        return {"key": "", "refused": reason}

    try:
        yield ask
    finally:
        for process in processes:
            process.stop()
        for _ in processes:
            free.get().close()


def _serve(link: Connection) -> None:
    """The process that measures."""
    torch.set_num_threads(1)
    answers(link, lambda link: link.recv(), _measured)


def _measured(job: _Job) -> Answer:
    """What is found of one sample: its key, and why it is refused, or scores, cuts and size."""
    try:
        record = _reader(job.directory).read(job.number)
    except SampleError as error:
        return {"key": error.key, "refused": str(error)[:4000]}
    try:
        known = known_meta(record)
        found = measure(record, job.limits, _detector() if job.with_text else None, job.shots)
    except (DecodeError, MediumError) as error:
        return {"key": record.key, "refused": str(error)[:4000]}
    facts = {part.name: getattr(known, part.name) for part in fields(MediumFacts)}
    return {"key": record.key, "scores": found.scores, "cuts_s": found.cuts_s, "facts": facts}


def _scored(record: Record, said: dict[str, Any]) -> Record:
    """The record with what a process found, which is not trusted: it is checked like a record's."""
    measured = {name: round(value, 6) for name, value in said["scores"].items()}
    document = {"schema": SCHEMA, "modality": record.meta.modality, "scores": measured}
    checked = parse_meta(record.key, {**document, **said["facts"]})
    extra = {name: value for name, value in record.meta.extra.items() if name != "cuts_s"}
    if said["cuts_s"]:
        extra["cuts_s"] = " ".join(f"{time_s:.3f}" for time_s in said["cuts_s"])
    facts = {part.name: getattr(checked, part.name) for part in fields(MediumFacts)}
    scores = {**record.meta.scores, **checked.scores}
    return structs.replace(
        record, meta=structs.replace(record.meta, **facts, scores=scores, extra=extra)
    )


@lru_cache(1)
def _reader(directory: str) -> ShardReader:
    return ShardReader(Dataset(directory))


@lru_cache(1)
def _detector() -> TextDetector:
    return TextDetector()
