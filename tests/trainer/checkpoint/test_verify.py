"""Digests of files: of blocks, by many threads, whatever the pieces that bytes came in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kinodit.models.random import generator
from kinodit.trainer.checkpoint.manifest import BLOCK_BYTES, BlockDigest, record_of
from kinodit.trainer.checkpoint.verify import Hashing

SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 12345]


def bytes_of(size: int) -> bytes:
    return generator("file", size).bytes(size)


def test_the_digest_is_sha256_of_the_blocks_sha256() -> None:
    data = bytes_of(SIZES[-1])
    first, second, third = (
        hashlib.sha256(data[start : start + BLOCK_BYTES]).digest()
        for start in range(0, len(data), BLOCK_BYTES)
    )
    record = record_of(data)
    assert record.size == len(data)
    assert record.sha256 == hashlib.sha256(first + second + third).hexdigest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [999_983, BLOCK_BYTES, 3 * BLOCK_BYTES])
def test_pieces_make_no_difference(size: int, piece: int) -> None:
    data = memoryview(bytes_of(size))
    digest = BlockDigest()
    for start in range(0, size, piece):
        digest.update(data[start : start + piece])
    assert digest.record() == record_of(bytes(data))


@pytest.mark.parametrize("size", SIZES)
def test_a_file_as_it_was_written_is_good(size: int, tmp_path: Path) -> None:
    data = bytes_of(size)
    (tmp_path / "file").write_bytes(data)
    assert Hashing(tmp_path, {"file": record_of(data)}).problems() == []


@pytest.mark.parametrize("place", [0, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 12344])
def test_a_flipped_bit_of_any_block_is_found(place: int, tmp_path: Path) -> None:
    data = bytearray(bytes_of(SIZES[-1]))
    record = record_of(bytes(data))
    data[place] ^= 1
    (tmp_path / "file").write_bytes(data)
    (problem,) = Hashing(tmp_path, {"file": record}).problems()
    assert problem.startswith(f"{tmp_path.name}/file: expected sha256 {record.sha256[:12]}, found")


def test_blocks_that_changed_places_are_found(tmp_path: Path) -> None:
    data = bytes_of(2 * BLOCK_BYTES)
    (tmp_path / "file").write_bytes(data[BLOCK_BYTES:] + data[:BLOCK_BYTES])
    assert len(Hashing(tmp_path, {"file": record_of(data)}).problems()) == 1


def test_files_are_shared_out(tmp_path: Path) -> None:
    files = {f"file{index}": record_of(b"expected") for index in range(5)}
    for name in files:
        (tmp_path / name).write_bytes(b"found...")
    ours = [Hashing(tmp_path, files, index, 2).problems() for index in (0, 1)]
    assert [len(problems) for problems in ours] == [3, 2]
    assert len({*ours[0], *ours[1]}) == 5
    assert [p for p in Hashing(tmp_path, {"none": record_of(b"x")}).problems() if "read" in p]
