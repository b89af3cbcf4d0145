"""Bytes of anyone: no crash, no hang, no code of theirs, every fault named, no good sample lost.

Archives, headers, indexes, manifests, JSON and media are changed at places and by values that
hypothesis chooses, with checksums made right again or left wrong, and read as training reads them.
The small size takes seconds; the full one goes on for ten minutes, and its figures are kept.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedMedia
from kinodit.data.index import INDEX_DTYPE, ManifestError
from kinodit.data.manifest import Dataset, Manifest, ShardEntry, content_hash
from kinodit.data.probe import MediumError, probe
from kinodit.data.reader import SampleError, ShardReader
from kinodit.data.record import Record, encode_record
from kinodit.data.salvage import salvage
from kinodit.data.tar import members
from kinodit.data.worker import DecodeWorker
from kinodit.data.writer import sample_bytes
from tests.data.clips import (
    clip_bytes,
    image_bytes,
    image_record,
    sound_bytes,
    sound_record,
    video_record,
    write_dataset,
)
from tests.support.evidence import write_evidence
from tests.support.sampling import commit_seed

CONFIG = DecodeConfig(
    height=24, width=24, num_frames=2, fps=6.0, window="first", use_audio=True, decode_limit_s=20.0
)
FULL_S = 600
EXAMPLES = 50
"""Of one seed."""
ME = "tests/data/test_fuzz.py"
HOSTILE = [
    b"cos\nsystem\n(S'touch %s'\ntR.",
    b"pipe:touch %s",
    b'{"a": ' * 5000,
    b"#EXTM3U\n/etc/passwd\n",
    b"\xff" * 8,
    b"../../../x.mp4",
]


def originals() -> list[Record]:
    """One sample of each kind of medium."""
    clip = clip_bytes(8, 12, keyframe_every=4, onset=400)
    webm = clip_bytes(8, 12, extension="webm")
    made = [
        video_record("k0", clip, 8, 12.0, has_audio=True),
        video_record("k1", webm, 8, 12.0, extension="webm"),
        *(
            image_record(f"k{2 + n}", image_bytes(e), e)
            for n, e in enumerate(("png", "jpg", "webp"))
        ),
        *(
            sound_record(f"k{5 + n}", sound_bytes(0.5, 100, e), 0.5, e)
            for n, e in enumerate(("flac", "wav", "opus"))
        ),
    ]
    return made


@dataclass
class Fuzz:
    """A dataset, what its samples decode to, and what was found."""

    root: Path
    dataset: Dataset
    worker: DecodeWorker
    expected: list[DecodedMedia]
    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def witness(self) -> Path:
        """Only code of a shard would make it."""
        return self.root / "witness"

    def load(self, dataset: Dataset, index: int) -> DecodedMedia | str:
        """As training loads a sample: what it is, or why it cannot be used."""
        start = time.monotonic()
        reader = ShardReader(dataset)
        try:
            return self.worker.decode(reader.read(index), CONFIG, 0.0, (0.5, 0.5))
        except (SampleError, DecodeError) as error:
            return str(error)
        finally:
            reader.close()
            self.slowest_s = max(self.slowest_s, time.monotonic() - start)

    def judge(self, dataset: Dataset, touched: set[int]) -> None:
        """Untouched samples are what they were; touched ones are samples or named faults."""
        for index, media in enumerate(self.expected):
            found = self.load(dataset, index)
            if isinstance(found, str):
                assert index in touched, f"a good sample was lost: {found}"
                assert found, "a fault without a reason"
                self.counts["faults named"] += 1
            elif index not in touched:
                assert same(found, media)
                self.counts["good samples"] += 1
            else:
                self.counts["touched, and still samples"] += 1
        assert not self.witness.exists(), "code of a shard was run"
        self.counts["datasets"] += 1


def same(ours: DecodedMedia, theirs: DecodedMedia) -> bool:
    for mine, other in ((ours.video, theirs.video), (ours.audio, theirs.audio)):
        if (mine is None) != (other is None):
            return False
        if mine is not None and other is not None and not torch.equal(mine, other):
            return False
    return True


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    root = tmp_path_factory.mktemp("fuzz")
    dataset = write_dataset(root / "good", originals(), shard_bytes=1 << 30)
    worker = DecodeWorker()
    reader = ShardReader(dataset)
    expected = [worker.decode(reader.read(n), CONFIG, 0.0, (0.5, 0.5)) for n in range(len(dataset))]
    reader.close()
    yield Fuzz(root, dataset, worker, expected)
    worker.close()


def changed(data: bytes, changes: list[tuple[float, bytes]], witness: Path) -> bytes:
    """`data` with bytes written over it at the given shares of its length."""
    out = bytearray(data)
    for share, value in changes:
        text = value.replace(b"%s", str(witness).encode())
        place = int(share * len(out))
        out[place : place + len(text)] = text[: max(0, len(out) - place)]
    return bytes(out)


PLACE = st.one_of(st.floats(0, 0.02), st.floats(0, 1, exclude_max=True))
VALUE = st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from(HOSTILE))
CHANGES = st.lists(st.tuples(PLACE, VALUE), min_size=1, max_size=4)


def rewritten(fuzz: Fuzz, tar: bytes, index: np.ndarray[Any, Any]) -> Dataset:
    """A dataset of these bytes, with a manifest that agrees with them."""
    folder = fuzz.root / "bad"
    folder.mkdir(exist_ok=True)
    (folder / "000000.tar").write_bytes(tar)
    (folder / "000000.idx").write_bytes(index.tobytes())
    (entry,) = fuzz.dataset.manifest.shards
    digests = hashlib.sha256(tar).hexdigest(), hashlib.sha256(index.tobytes()).hexdigest()
    new = replace(entry, num_bytes=len(tar), sha256=digests[0], index_sha256=digests[1])
    Manifest.of("bad", [new]).save(folder)
    return Dataset(folder)


def parts(fuzz: Fuzz) -> tuple[bytes, np.ndarray[Any, Any]]:
    folder = fuzz.dataset.directory
    tar = (folder / "000000.tar").read_bytes()
    return tar, np.fromfile(folder / "000000.idx", INDEX_DTYPE)


def in_the_archive(fuzz: Fuzz, sums: bool, which: int, changes: list[tuple[float, bytes]]) -> None:
    """Any bytes of a shard; with `sums`, the checksums of the index agree with them."""
    tar, index = parts(fuzz)
    bad = changed(tar, changes, fuzz.witness)
    rows = [(int(row["offset"]), int(row["offset"] + row["size"])) for row in index]
    touched = {n for n, (a, b) in enumerate(rows) if bad[a:b] != tar[a:b]}
    if sums:
        for number, (start, end) in enumerate(rows):
            index[number]["crc32"] = zlib.crc32(bad[start:end])
    fuzz.judge(rewritten(fuzz, bad, index), touched)
    assert_found_again(fuzz, index, touched)


def assert_found_again(fuzz: Fuzz, index: np.ndarray[Any, Any], touched: set[int]) -> None:
    """What no change touches is indexed anew as it was."""
    found, damages = salvage(fuzz.root / "bad" / "000000.tar")
    here = {(int(row["offset"]), int(row["size"])) for row in found}
    for number, row in enumerate(index):
        assert number in touched or (int(row["offset"]), int(row["size"])) in here
    assert all(damage.reason for damage in damages)


def in_a_header(fuzz: Fuzz, sums: bool, which: int, changes: list[tuple[float, bytes]]) -> None:
    """A tar header, with its own checksum made right, so that its fields are believed."""
    tar, index = parts(fuzz)
    headers = [member.start for member in members(tar, whole=True)]
    start = headers[which % len(headers)]
    header = bytearray(changed(tar[start : start + 512], changes, fuzz.witness))
    if sums:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    bad = tar[:start] + bytes(header) + tar[start + 512 :]
    owner = int(np.searchsorted(index["offset"], start, side="right")) - 1
    first, size = int(index[owner]["offset"]), int(index[owner]["size"])
    index[owner]["crc32"] = zlib.crc32(bad[first : first + size])
    fuzz.judge(rewritten(fuzz, bad, index), {owner})


def in_the_index(fuzz: Fuzz, sums: bool, which: int, changes: list[tuple[float, bytes]]) -> None:
    """Rows of an index, whose digest agrees with them or not."""
    tar, index = parts(fuzz)
    bad = np.frombuffer(changed(index.tobytes(), changes, fuzz.witness), INDEX_DTYPE).copy()
    dataset = rewritten(fuzz, tar, bad)
    fuzz.judge(dataset, {n for n in range(len(index)) if bad[n] != index[n]})
    path = dataset.directory / "000000.idx"
    path.write_bytes(changed(bad.tobytes(), [(0.5, b"\x01\x02\x03")], fuzz.witness))
    if path.read_bytes() != bad.tobytes():
        with pytest.raises(ManifestError):
            Dataset(dataset.directory)
        fuzz.counts["faults named"] += 1


def in_a_member(name: Callable[[Record], str]) -> Callable[..., None]:
    """The JSON or the medium of a sample, with checksums that agree with it."""

    def change(fuzz: Fuzz, sums: bool, which: int, changes: list[tuple[float, bytes]]) -> None:
        tar, index = parts(fuzz)
        records = originals_of(fuzz)
        number = which % len(records)
        sample = encode_record(records[number])
        member = name(records[number])
        sample[member] = changed(payload_of(sample, member), changes, fuzz.witness)
        data = sample_bytes(sample)
        start, size = int(index[number]["offset"]), int(index[number]["size"])
        assert len(data) == size
        bad = tar[:start] + data + tar[start + size :]
        index[number]["crc32"] = zlib.crc32(data)
        fuzz.judge(rewritten(fuzz, bad, index), {number})
        assert_found_again(fuzz, index, {number})
        if member not in ("json", "txt"):
            with suppress(MediumError):
                probe(member, payload_of(sample, member))

    return change


def payload_of(sample: dict[str, str | bytes], member: str) -> bytes:
    payload = sample[member]
    assert isinstance(payload, bytes)
    return payload


def in_the_manifest(fuzz: Fuzz, sums: bool, which: int, changes: list[tuple[float, bytes]]) -> None:
    """The manifest, whose content hash is made right again where it can still be read."""
    tar, index = parts(fuzz)
    folder = rewritten(fuzz, tar, index).directory
    path = folder / "manifest.json"
    bad = changed(path.read_bytes(), changes, fuzz.witness)
    if sums:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            document = json.loads(bad)
            shards = [ShardEntry(**shard) for shard in document["shards"]]
            bad = json.dumps({**document, "content_hash": content_hash(shards)}).encode()
    path.write_bytes(bad)
    try:
        dataset = Dataset(folder)
    except ManifestError as error:
        assert str(error)
        fuzz.counts["faults named"] += 1
        return
    fuzz.judge(dataset, set())


_RECORDS: list[Record] = []


def originals_of(fuzz: Fuzz) -> list[Record]:
    if not _RECORDS:
        reader = ShardReader(fuzz.dataset)
        _RECORDS.extend(reader.read(number) for number in range(len(fuzz.dataset)))
        reader.close()
    return _RECORDS


def medium_of(record: Record) -> str:
    assert record.medium is not None
    return record.medium[0]


KINDS: dict[str, Callable[..., None]] = {
    "archive": in_the_archive,
    "header": in_a_header,
    "index": in_the_index,
    "json": in_a_member(lambda _: "json"),
    "manifest": in_the_manifest,
    "media": in_a_member(medium_of),
}


def hunt(fuzz: Fuzz, kind: str, seed: int, count: int) -> None:
    """`count` examples that hypothesis draws from `seed`."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(sums=st.booleans(), which=st.integers(0, 63), changes=CHANGES)
    def one(sums: bool, which: int, changes: list[tuple[float, bytes]]) -> None:
        KINDS[kind](fuzz, sums, which, changes)

    one()


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_bytes(fuzz: Fuzz, kind: str) -> None:
    before = sum(fuzz.counts.values())
    hunt(fuzz, kind, seed=commit_seed(f"fuzz {kind}"), count=6)
    assert sum(fuzz.counts.values()) > before
    assert fuzz.slowest_s < CONFIG.decode_limit_s + 60


@pytest.mark.slow
@pytest.mark.timeout(FULL_S + 600)
def test_hostile_bytes_for_ten_minutes(fuzz: Fuzz, size: str) -> None:
    """A crash, a hang or a good sample that is lost ends it; decoders that crash are counted."""
    start, turns = time.monotonic(), 0
    limit_s, first = (FULL_S, 0) if size == "full" else (20, commit_seed("fuzz"))
    fuzz.counts.clear()
    started = fuzz.worker.num_started
    while time.monotonic() - start < limit_s:
        hunt(fuzz, list(KINDS)[turns % len(KINDS)], first + turns, EXAMPLES)
        turns += 1
    assert turns >= len(KINDS)
    assert not fuzz.witness.exists()
    if size == "full":
        figures = {
            "command": f"pytest -m slow --size full {ME}",
            "kinds": list(KINDS),
            "examples": turns * EXAMPLES,
            **fuzz.counts,
            "seconds": round(time.monotonic() - start),
            "slowest_s": round(fuzz.slowest_s, 2),
            "decoders replaced": fuzz.worker.num_started - started,
            "code run": int(fuzz.witness.exists()),
        }
        write_evidence("fuzz", ME, figures)
