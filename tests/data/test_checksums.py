"""Checksums: the same numbers whatever computes them, in pieces or at once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib

import pytest
from blake3 import blake3

from kinodit.data import checksums
from kinodit.data.checksums import ALGORITHMS, Algorithm, Digest, SpanSums, crc32
from tests.support.ranks import ROOT

DATA = bytes(range(251)) * 5000


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 255, 4096, 80_001, len(DATA)])
def test_crc32_is_that_of_zlib(length: int) -> None:
    for start in (0, 3):
        piece = DATA[start : start + length]
        assert crc32(piece) == crc32(memoryview(piece)) == zlib.crc32(piece)
    assert crc32(b"123456789") == 0xCBF43926, "the check value of CRC-32/ISO-HDLC"


def test_the_fast_one_is_used_where_it_is_there() -> None:
    zlib_ng = pytest.importorskip("zlib_ng.zlib_ng")
    assert checksums.crc32 is zlib_ng.crc32


def test_without_it_the_numbers_are_the_same() -> None:
    script = """
import sys, zlib
sys.modules["zlib_ng"] = None
from kinodit.data import checksums
assert checksums.crc32 is zlib.crc32
print(checksums.crc32(b"123456789"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={"PYTHONPATH": "src"}, capture_output=True
    )
    assert done.stdout.strip() == b"3421780262", done.stderr


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_digests_come_piece_by_piece(algorithm: Algorithm) -> None:
    digest = Digest(algorithm)
    for start in range(0, len(DATA), 70_001):
        digest.update(memoryview(DATA)[start : start + 70_001])
    whole = hashlib.sha256(DATA) if algorithm == "sha256" else blake3(DATA)
    assert digest.hexdigest() == whole.hexdigest() and digest.num_bytes == len(DATA)


def test_blake3_is_the_published_function() -> None:
    """The digest of nothing, from the test vectors of its specification."""
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert Digest("blake3").hexdigest() == empty


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, None])
@pytest.mark.parametrize("sizes", [[], [1], [7, 0, 3000], [100] * 50, [2500, 100_000, 1, 4096, 5]])
def test_spans_are_summed_while_all_is_hashed(
    monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm | None, sizes: list[int]
) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", 1024)
    hashed: list[int] = []
    digest = Digest(algorithm) if algorithm else None
    if digest:
        update = digest.update

        def counted(part: memoryview) -> None:
            hashed.append(len(part))
            update(part)

        monkeypatch.setattr(digest, "update", counted)
    sums = SpanSums(memoryview(DATA), digest)
    end = 0
    for size in sizes:
        start, end = end, end + size
        assert sums.crc32_to(end) == zlib.crc32(DATA[start:end])
    assert hashed == [1024] * (-(-end // 1024) if digest else 0), "no more than a piece ahead"
    sums.finish()
    if digest:
        whole = hashlib.sha256(DATA) if algorithm == "sha256" else blake3(DATA)
        assert digest.hexdigest() == whole.hexdigest() and digest.num_bytes == len(DATA)
