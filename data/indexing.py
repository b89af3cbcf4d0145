"""Indexing a folder of shards that other tools wrote, in place.

What is done is kept: beside the shards lies a journal with a line for each finished one, until the
manifest is written. The same command goes on behind them after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kinodit.data.checksums import Algorithm, Digest
from kinodit.data.fork_server import fork_early
from kinodit.data.index import INDEX_DTYPE, Damage, ManifestError, build_index, shard_bytes
from kinodit.data.manifest import MANIFEST_FILE, Manifest, ShardEntry
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.salvage import salvage
from kinodit.data.writer import WriterError, disk_errors

JOURNAL_FILE = "index.partial.jsonl"
MIN_WORKER_BYTES = 64 << 20
"""What makes up for starting a process."""


@dataclass(frozen=True)
class IndexOptions:
    """What is indexed of a folder.

    skip_bad:  leave out what is damaged, instead of refusing its shard
    files:     names of shards in their order; None: every NAME.tar, sorted
    without:   shard -> keys of samples that are left out
    workers:   processes that read shards side by side
    algorithm: of the shards' digests; None: that of the manifest which is there, else BLAKE3
    """

    skip_bad: bool = False
    files: Sequence[str] | None = None
    without: Mapping[str, frozenset[str]] | None = None
    workers: int = 1
    algorithm: Algorithm | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise WriterError(f"{self.workers} workers cannot index anything: at least 1 is needed")


@dataclass(frozen=True)
class Progress:
    """Bytes of shards that were read, of how many, and the samples in them."""

    done_bytes: int
    total_bytes: int
    num_samples: int


@dataclass(frozen=True)
class IndexReport:
    """What was indexed.

    left_out: (shard, what it is) in the order of the shards
    num_kept: shards that an interrupted run had finished
    """

    manifest: Manifest
    left_out: tuple[tuple[str, Damage], ...]
    num_kept: int


@dataclass(frozen=True)
class _Done:
    """A finished shard: its entry, what is left out, and what decided both."""

    entry: ShardEntry
    left_out: tuple[Damage, ...]
    mtime_ns: int
    without: tuple[str, ...]
    skip_bad: bool

    def holds(self, folder: Path, mtime_ns: int, num_bytes: int, options: IndexOptions) -> bool:
        """Whether it is still what indexing the shard anew would give."""
        same = (self.mtime_ns, self.entry.num_bytes) == (mtime_ns, num_bytes)
        asked = (self.without, self.skip_bad, self.entry.algorithm) == (
            _without(options, self.entry.file),
            options.skip_bad,
            options.algorithm,
        )
        if not (same and asked):
            return False
        try:
            index = (folder / self.entry.index_file).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(index).hexdigest() == self.entry.index_sha256


class _Watch:
    """Adds up what is done, and tells it."""

    def __init__(self, progress: Callable[[Progress], None], total_bytes: int) -> None:
        self._progress = progress
        self._now = Progress(0, total_bytes, 0)

    def add(self, entry: ShardEntry) -> None:
        """A shard is finished."""
        self._now = Progress(
            self._now.done_bytes + entry.num_bytes,
            self._now.total_bytes,
            self._now.num_samples + entry.num_samples,
        )
        self._progress(self._now)

    def within(self, num_bytes: int) -> None:
        """So many bytes of the next shard were read."""
        self._progress(replace(self._now, done_bytes=self._now.done_bytes + num_bytes))


def index_shards(
    directory: Path | str,
    name: str,
    options: IndexOptions | None = None,
    progress: Callable[[Progress], None] = lambda now: None,
) -> IndexReport:
    """Gives the shards of a folder indexes and a manifest; shards are only read.

    For shards made by other tools, and to repair a dataset of which a shard was replaced. Indexes
    and manifest that are there are replaced, each file whole. Shards that an interrupted run has
    finished are not read again, unless their size or time has changed.

    Media that records do not describe are opened in processes of their own: one that hangs or
    crashes its decoder is damaged like others.

    Raises ManifestError for a shard that breaks the contract, WriterError if nothing can be done.
    """
    folder, options = Path(directory), options or IndexOptions()
    options = replace(options, algorithm=options.algorithm or _algorithm_there(folder))
    tars = _shards(folder, options)
    with disk_errors(folder):
        stats = [tar.stat() for tar in tars]
    before = _read_journal(folder / JOURNAL_FILE)
    finished: dict[str, _Done] = {}
    for tar, stat in zip(tars, stats, strict=True):
        done = before.get(tar.name)
        if done is not None and done.holds(folder, stat.st_mtime_ns, stat.st_size, options):
            finished[tar.name] = done
    num_kept = len(finished)
    watch = _Watch(progress, sum(stat.st_size for stat in stats))
    for done in finished.values():
        watch.add(done.entry)
    waiting = [
        (tar, stat.st_mtime_ns)
        for tar, stat in zip(tars, stats, strict=True)
        if tar.name not in finished
    ]
    with disk_errors(folder), (folder / JOURNAL_FILE).open("a") as journal:
        for done in _each(waiting, options, watch.within):
            journal.write(json.dumps(asdict(done)) + "\n")
            journal.flush()
            finished[done.entry.file] = done
            watch.add(done.entry)
    ordered = [finished[tar.name] for tar in tars]
    manifest = Manifest.of(name, [done.entry for done in ordered])
    with disk_errors(folder):
        manifest.save(folder)
        (folder / JOURNAL_FILE).unlink()
    left_out = ((done.entry.file, damage) for done in ordered for damage in done.left_out)
    return IndexReport(manifest, tuple(left_out), num_kept)


def _each(
    waiting: Sequence[tuple[Path, int]], options: IndexOptions, seen: Callable[[int], None]
) -> Iterator[_Done]:
    """Shards (path, time) as they are finished; `seen` hears of bytes of one that is not yet."""
    num_bytes = sum(tar.stat().st_size for tar, _ in waiting)
    workers = min(options.workers, len(waiting), 1 + num_bytes // MIN_WORKER_BYTES)
    if workers <= 1:
        for tar, mtime_ns in waiting:
            yield _index_one(tar, mtime_ns, options, seen)
        return
    context = multiprocessing.get_context("forkserver")
    # Each has a server of its own for the processes in which media are opened.
    with ProcessPoolExecutor(workers, context, initializer=fork_early) as pool:
        futures = [pool.submit(_index_one, tar, time, options) for tar, time in waiting]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ManifestError(
                "a process that read shards died, for want of memory, say: `--workers 1` shows at "
                "which shard. What was finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _shards(folder: Path, options: IndexOptions) -> list[Path]:
    if options.files is None:
        found = sorted(folder.glob("*.tar"))
    else:
        found = [folder / file for file in options.files]
        missing = [path.name for path in found if not path.is_file()]
        if missing:
            raise WriterError(f"{folder} has no shard {missing[0]}, which is asked for")
    if not found:
        raise WriterError(f"{folder} has no shards (files NAME.tar) to index")
    return found


def _algorithm_there(folder: Path) -> Algorithm:
    """What the digests of a manifest are that is there, though it may be damaged: they go on."""
    path = folder / MANIFEST_FILE
    with disk_errors(folder):
        is_old = path.is_file() and b'"blake3":' not in path.read_bytes()
    return "sha256" if is_old else "blake3"


def _ignore(end: int) -> None:
    """Hears of progress that nobody watches."""


def _index_one(
    tar: Path, mtime_ns: int, options: IndexOptions, seen: Callable[[int], None] = _ignore
) -> _Done:
    """Reads one shard and publishes its index."""
    without, left_out = _without(options, tar.name), list[Damage]()
    assert options.algorithm is not None
    digest = Digest(options.algorithm)
    # There is no process before a medium has to be opened.
    with closing(ProbeWorker()) as worker:
        if options.skip_bad:
            digest.update(shard_bytes(tar))
            rows, left_out = salvage(tar, seen=seen, without=without, opener=worker.probe)
        else:
            rows = build_index(
                tar, seen=seen, left_out=left_out.append, without=without, digest=digest,
                opener=worker.probe,
            )  # fmt: skip
    index = rows.tobytes()
    entry = ShardEntry(
        file=tar.name,
        num_samples=len(index) // INDEX_DTYPE.itemsize,
        num_bytes=digest.num_bytes,
        index_sha256=hashlib.sha256(index).hexdigest(),
        **{options.algorithm: digest.hexdigest()},
    )
    path = tar.parent / entry.index_file
    temporary = path.with_suffix(".idx.tmp")
    temporary.write_bytes(index)
    temporary.replace(path)
    return _Done(entry, tuple(left_out), mtime_ns, without, options.skip_bad)


def _without(options: IndexOptions, file: str) -> tuple[str, ...]:
    return tuple(sorted((options.without or {}).get(file, ())))


def _read_journal(path: Path) -> dict[str, _Done]:
    """Shard -> what its last line says. A line that was cut off counts for nothing."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    found: dict[str, _Done] = {}
    for line in lines:
        try:
            done = _parse(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        found[done.entry.file] = done
    return found


def _parse(row: dict[str, Any]) -> _Done:
    entry = ShardEntry(**row["entry"])
    left_out = tuple(Damage(**damage) for damage in row["left_out"])
    return _Done(entry, left_out, row["mtime_ns"], tuple(row["without"]), row["skip_bad"])
