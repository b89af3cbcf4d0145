"""Any sample by its place, and never a wrong one: every damage is an error with its name."""

from __future__ import annotations

import gc
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from kinodit.data.index import INDEX_DTYPE
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardError, ShardReader
from kinodit.data.record import Record, RecordMeta
from tests.data.clips import write_dataset


def records(count: int) -> list[Record]:
    return [
        Record(
            f"s{number:03d}",
            RecordMeta(id=f"s{number:03d}", modality="image", width=8, height=8),
            {"png": bytes([number]) * (100 + 37 * number)},
        )
        for number in range(count)
    ]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """24 samples in several shards."""
    found = write_dataset(tmp_path / "clips", records(24), shard_bytes=12_000)
    assert len(found.manifest.shards) >= 4
    return found


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_every_sample_is_what_was_written(dataset: Dataset) -> None:
    reader = ShardReader(dataset, max_open=2)
    for index in np.random.default_rng(0).permutation(24).tolist():
        assert reader.read(index) == records(24)[index]
    reader.close()


def test_threads_share_a_reader_and_few_files_stay_open(dataset: Dataset) -> None:
    reader = ShardReader(dataset, max_open=2)
    expected = records(24)
    gc.collect()
    before = num_open_files()

    def read(turn: int) -> bool:
        return reader.read(turn * 7 % 24) == expected[turn * 7 % 24]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(2000)))
    assert num_open_files() <= before + 2
    reader.close()
    assert num_open_files() == before


def test_a_file_is_closed_with_its_last_reader(dataset: Dataset) -> None:
    first, second = (shard.file for shard in dataset.manifest.shards[:2])
    files = ShardReader(dataset, max_open=1)._files
    held = files.open(first)
    descriptor = held.descriptor
    assert files.get(first) is held is files.open(first)
    files.open(second)
    assert files.get(first) is None
    assert os.pread(descriptor, 4, 0) == b"s000", "it is still being read"
    del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_missing_shard_is_named(dataset: Dataset) -> None:
    path, _, _ = dataset.locate(20)
    path.unlink()
    with pytest.raises(ShardError, match=r"sample 20 .*No such file.*Put the shard back") as error:
        ShardReader(dataset).read(20)
    assert str(path) in str(error.value)
    assert ShardReader(dataset).read(0).key == "s000"


def test_a_cut_off_shard_says_how_much_is_there(dataset: Dataset) -> None:
    path, offset, size = dataset.locate(5)
    os.truncate(path, offset + 700)
    with pytest.raises(ShardError) as error:
        ShardReader(dataset).read(5)
    for part in (str(path), "sample 5", f"expected {size} bytes, found 700", str(offset + 700)):
        assert part in str(error.value)
    assert ShardReader(dataset).read(4).key == "s004", "samples before the cut are untouched"


def test_a_flipped_bit_is_noticed(dataset: Dataset) -> None:
    path, offset, size = dataset.locate(7)
    for where in (offset + 3, offset + 600, offset + size - 1):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[where] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"was changed after it was indexed.*CRC-32"):
            ShardReader(dataset).read(7)
        path.write_bytes(whole)
    assert ShardReader(dataset).read(7).key == "s007"


def with_span(dataset: Dataset, index: int, span: bytes) -> ShardReader:
    """A reader for which sample `index` is `span`, with an index that agrees with it."""
    path, offset, size = dataset.locate(index)
    shard = dataset.manifest.shards[0]
    assert path.name == shard.file and len(span) == size
    whole = bytearray(path.read_bytes())
    whole[offset : offset + size] = span
    path.write_bytes(whole)
    rows = np.fromfile(path.with_suffix(".idx"), INDEX_DTYPE)
    rows["crc32"][index] = zlib.crc32(span)
    dataset._index = lru_cache(lambda _: memoryview(rows.tobytes()))
    return ShardReader(dataset)


def span_of(dataset: Dataset, index: int) -> bytearray:
    path, offset, size = dataset.locate(index)
    return bytearray(path.read_bytes()[offset : offset + size])


def checksummed(header: bytearray) -> None:
    """Gives the tar header at the start of `header` the right checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (slice(156, 157), b"2", "only regular files"),
        (slice(124, 136), b"77777777777\0", "bytes"),
        (slice(257, 262), b"xxxxx", "USTAR"),
        (slice(0, 9), b"other.png", "2 samples, not one"),
    ],
)
def test_a_hostile_sample_is_refused_though_its_checksums_are_right(
    dataset: Dataset, where: slice, value: bytes, message: str
) -> None:
    span = span_of(dataset, 2)
    span[where] = value
    checksummed(span)
    with pytest.raises(ShardError, match=f"breaks the record contract.*{message}"):
        with_span(dataset, 2, bytes(span)).read(2)


@pytest.mark.parametrize("name", [b"S002.", b"../x.", b"/abs.", b"s 02."])
def test_a_name_that_is_no_key_is_refused(dataset: Dataset, name: bytes) -> None:
    span = span_of(dataset, 2)
    for start in range(0, len(span), 512):
        if span[start : start + 5] == b"s002.":
            header = span[start : start + 512]
            header[:5] = name
            checksummed(header)
            span[start : start + 512] = header
    with pytest.raises(ShardError, match=r"breaks the record contract.*not allowed"):
        with_span(dataset, 2, bytes(span)).read(2)


def test_a_wrong_header_checksum_is_refused(dataset: Dataset) -> None:
    span = span_of(dataset, 2)
    span[1] ^= 1
    with pytest.raises(ShardError, match="damaged"):
        with_span(dataset, 2, bytes(span)).read(2)


def test_an_index_that_claims_more_than_the_shard_has_is_refused_unread(dataset: Dataset) -> None:
    rows = np.fromfile(dataset.locate(0)[0].with_suffix(".idx"), INDEX_DTYPE)
    rows["size"][2] = 4_000_000_000
    dataset._index = lru_cache(lambda _: memoryview(rows.tobytes()))
    with pytest.raises(ShardError, match="cannot lie there: its index says 4000000000 bytes"):
        ShardReader(dataset).read(2)
