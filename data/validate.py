"""Checking a dataset byte by byte: `kinodit data validate`.

A damaged shard is not given up at its first fault: the index says where each sample lies, so every
sample is judged by itself, and the report says how many are lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.data.checksums import ALGORITHMS, Digest, crc32
from kinodit.data.index import INDEX_DTYPE, Row, index_row, read_span, spans
from kinodit.data.manifest import Manifest, ShardEntry
from kinodit.data.probe import MediumError, MediumFacts
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.record import Record, RecordError
from kinodit.data.tar import TarError, check_end

_PROBE_TOLERANCE = 0.02
"""Share by which fps and duration may differ: containers round them."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which file, of which sample and member, what and instead of what.

    `key` and `member` are empty where the fault is not of one sample or not of one member.
    """

    file: str
    key: str
    member: str
    expected: str
    found: str

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.file, self.key, self.member) if part)
        return f"{place}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class ValidationReport:
    """What was found. `num_good` counts samples of which every byte is as it should be.

    keys: shard -> a digest of each of its keys, so that parts can be compared without their data
    """

    num_samples: int
    num_good: int
    problems: tuple[Problem, ...]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)


def validate(
    directory: Path | str,
    *,
    decode: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ValidationReport:
    """Checks manifest, shards, indexes and records; with `decode` also opens every medium.

    Media are opened in a process of their own, so that one that hangs or crashes it is a problem
    like others. `part` (i, n) checks every n-th shard from the i-th on. Raises ManifestError only
    if there is no manifest that can be read. `progress` is called with (samples checked, samples of
    the part).
    """
    folder = Path(directory)
    manifest = Manifest.load(folder)
    first, num_parts = part
    shards = manifest.shards[first::num_parts]
    num_samples = sum(shard.num_samples for shard in shards)
    problems: list[Problem] = []
    done = num_good = 0
    keys: dict[str, str] = {}
    with closing(ProbeWorker()) as worker:
        opener = worker if decode else None
        for shard in shards:
            bad_before = len(problems)
            index = _check_index(folder, shard, problems)
            for key, faults in _check_samples(folder, shard, index, opener):
                if key in keys and key:
                    other = f"that key in {keys[key]} too"
                    faults.append(Problem(shard.file, key, "", "a key of its own", other))
                keys.setdefault(key, shard.file)
                problems += faults
                num_good += not faults
                done += 1
                progress(done, num_samples)
            if len(problems) == bad_before:
                problems += _check_whole(folder, shard)
    if first == 0:
        problems += _strangers(folder, manifest)
    return ValidationReport(num_samples, num_good, tuple(problems), _digests(keys))


def _digests(keys: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for key, shard in keys.items():
        if key:
            found.setdefault(shard, []).append(hashlib.sha256(key.encode()).hexdigest()[:16])
    return {shard: tuple(digests) for shard, digests in found.items()}


def _check_index(
    folder: Path, shard: ShardEntry, problems: list[Problem]
) -> NDArray[np.void] | None:
    """The index if it can be used at all."""
    path = folder / shard.index_file
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(Problem(path.name, "", "", "the shard's index", str(error.strerror)))
        return None
    size = shard.num_samples * INDEX_DTYPE.itemsize
    if len(data) != size:
        problems.append(Problem(path.name, "", "", f"{size} bytes", f"{len(data)} bytes"))
        return None
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.index_sha256:
        problems.append(Problem(path.name, "", "", f"SHA-256 {shard.index_sha256}", digest))
        return None
    return np.frombuffer(data, dtype=INDEX_DTYPE)


def _check_samples(
    folder: Path, shard: ShardEntry, index: NDArray[np.void] | None, opener: ProbeWorker | None
) -> Iterator[tuple[str, list[Problem]]]:
    """(key, faults) of each sample; the key is "" where even that could not be read."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
        view = np.memmap(path, np.uint8, "r").data if size else memoryview(b"")
    except OSError as error:
        lost = f"{error.strerror}: {shard.num_samples} samples lost"
        yield "", [Problem(shard.file, "", "", f"a shard of {shard.num_bytes} bytes", lost)]
        return
    if size < shard.num_bytes:
        lost_from = f"{size} bytes: it was cut off"
        if index is not None:
            ends = index["offset"] + index["size"]
            lost_from += f", {int((ends > size).sum())} of {len(index)} samples are lost"
        yield "", [Problem(shard.file, "", "", f"{shard.num_bytes} bytes", lost_from)]
    for number in range(shard.num_samples if index is not None else 0):
        assert index is not None
        row = Row(*index[number].item())
        if row.offset + row.size <= size:
            yield _check_sample(shard.file, number, row, view, opener)


def _check_sample(
    file: str, number: int, row: Row, view: memoryview, opener: ProbeWorker | None
) -> tuple[str, list[Problem]]:
    data = view[row.offset : row.offset + row.size]
    name = f"sample {number} at byte {row.offset}"
    try:
        found = list(spans(data, whole=False))
        key = found[0].key if found else ""
        if len(found) != 1:
            return key, [Problem(file, name, "", "the members of one sample", f"{len(found)} keys")]
        record = read_span(data, found[0])
    except (TarError, RecordError) as error:
        return "", [Problem(file, name, "", "a record", str(error))]
    crc = crc32(data)
    faults = []
    if crc != row.crc32:
        faults.append(Problem(file, key, "", f"CRC-32 {row.crc32:08x}", f"{crc:08x}"))
    faults += _check_digests(file, record)
    if record.meta.is_probed:
        # The checksum was judged above; here only what the record says of itself is compared.
        said = index_row(record.meta, row.offset, data)._replace(crc32=row.crc32)
        faults += [
            Problem(file, key, f"index {part}", str(mine), str(theirs))
            for part, mine, theirs in zip(Row._fields, said, row, strict=True)
            if mine != theirs
        ]
    if opener is not None and not faults and record.medium is not None:
        faults += _check_medium(file, record, opener)
        faults += _check_references(file, record, opener)
    return key, faults


def _check_digests(file: str, record: Record) -> Iterator[Problem]:
    for member, expected in record.meta.sha256.items():
        if member not in record.members:
            yield Problem(file, record.key, member, "a member of that name", "none")
            continue
        found = hashlib.sha256(record.members[member]).hexdigest()
        if found != expected:
            yield Problem(file, record.key, member, f"SHA-256 {expected}", found)


def _check_medium(file: str, record: Record, opener: ProbeWorker) -> Iterator[Problem]:
    assert record.medium is not None
    member, data = record.medium
    try:
        facts = vars(opener.probe(member, data))
    except MediumError as error:
        yield Problem(file, record.key, member, "a medium that opens", str(error))
        return
    if not record.meta.is_probed:
        return
    for name in vars(MediumFacts()):
        said, found = getattr(record.meta, name), facts[name]
        if not _close(said, found):
            yield Problem(file, record.key, f"{member} {name}", str(said), str(found))


def _check_references(file: str, record: Record, opener: ProbeWorker) -> Iterator[Problem]:
    for member, data in record.references:
        try:
            opener.probe(member.rpartition(".")[2], data)
        except MediumError as error:
            yield Problem(file, record.key, member, "a picture that opens", str(error))


def _close(said: Any, found: Any) -> bool:
    if isinstance(said, float) or isinstance(found, float):
        return bool(abs(said - found) <= _PROBE_TOLERANCE * max(abs(said), abs(found)))
    return bool(said == found)


def _check_whole(folder: Path, shard: ShardEntry) -> Iterator[Problem]:
    """The shard's digest, and that nothing hides behind its last sample."""
    view = np.memmap(folder / shard.file, np.uint8, "r").data
    digest = Digest(shard.algorithm)
    digest.update(view)
    expected = shard.blake3 or shard.sha256
    if digest.hexdigest() != expected:
        name = ALGORITHMS[shard.algorithm]
        yield Problem(shard.file, "", "", f"{name} {expected}", digest.hexdigest())
    index = np.fromfile(folder / shard.index_file, dtype=INDEX_DTYPE)
    try:
        check_end(view, int(index[-1]["offset"] + index[-1]["size"]) if len(index) else 0)
    except TarError as error:
        yield Problem(shard.file, "", "", "the end of the archive", str(error))


def _strangers(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Shards that lie there and are in no manifest: nobody would read them."""
    known = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield Problem(path.name, "", "", "a shard of the manifest", "it is not listed there")
