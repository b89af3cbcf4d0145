"""Samples that are read in one pass are those that the strict reader of tar archives finds."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.index import read_sample
from kinodit.data.record import Record, RecordError, encode_record
from kinodit.data.tar import BLOCK, TarError
from kinodit.data.writer import sample_bytes
from tests.data.shards import image_record, picture, tar_bytes

PICTURE = picture()
SAMPLE = sample_bytes(encode_record(image_record(0)))
HEADERS = [
    start for start in range(0, len(SAMPLE), BLOCK) if SAMPLE[start + 257 : start + 262] == b"ustar"
]


def outcome(data: bytes) -> Record | str:
    try:
        return read_sample(data)
    except (TarError, RecordError) as error:
        return f"{type(error).__name__}: {error}"


def assert_judged_alike(data: bytes) -> Record | str:
    found = outcome(data)
    with (
        patch("kinodit.data.index.usual_record", return_value=None),
        patch("kinodit.data.tar.plain_header", return_value=None),
    ):
        assert outcome(data) == found
    return found


def members(*pairs: tuple[str, bytes]) -> bytes:
    """A run of members, without the end of an archive."""
    data = tar_bytes(pairs)
    return data[: sum(BLOCK + -(-len(payload) // BLOCK) * BLOCK for _, payload in pairs)]


def test_a_usual_sample_needs_no_general_reader() -> None:
    with patch("kinodit.data.index.spans", side_effect=AssertionError):
        assert read_sample(SAMPLE) == image_record(0)
        copied = bytes(bytearray(SAMPLE))
        (picture,) = read_sample(copied).members.values()
        assert picture == PICTURE and isinstance(picture, memoryview) and picture.obj is copied


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "hold 0 samples"),
        (members(("a.png", PICTURE), ("b.png", PICTURE)), "hold 2 samples"),
        (members(("a.png", PICTURE), ("b.txt", b"x"), ("a.txt", b"x")), "there before"),
        (members(("a.png", PICTURE), ("a.png", PICTURE)), "two members 'png'"),
        (members(("A.png", PICTURE)), "key 'A' is not allowed"),
        (members(("a.exe", b"x")), "member 'exe' is not allowed"),
        (members(("dir/a.png", PICTURE)), "key 'dir/a' is not allowed"),
        (members(("\u00e4.png", PICTURE)), "key '\u00e4' is not allowed"),
        (SAMPLE + bytes(BLOCK), "found zeros"),
        (SAMPLE[:-BLOCK], "cut off"),
        (SAMPLE[:-1], "cut off"),
        (SAMPLE + b"x", "cut off"),
    ],
)
def test_what_is_no_sample_is_refused_in_the_same_words(data: bytes, reason: str) -> None:
    found = assert_judged_alike(data)
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize("length", [95, 96, 97, 120])
def test_a_name_that_fills_its_field_or_needs_another_is_read_all_the_same(length: int) -> None:
    """Of 100 bytes, `KEY.png` has 99 with a byte of zero behind it, or 100 with the mode there."""
    key = "k" * length
    data = sample_bytes({"__key__": key, "png": PICTURE})
    found = assert_judged_alike(data)
    assert isinstance(found, Record) and found.key == key


@given(
    header=st.sampled_from(HEADERS),
    place=st.integers(0, BLOCK - 1) | st.sampled_from([124, 134, 135, 148, 154, 155, 156, 345]),
    value=st.sampled_from(b"\0 0178x.") | st.integers(0, 255),
    length=st.none() | st.integers(0, len(SAMPLE)),
)
@settings(max_examples=400, deadline=None)
def test_damage_is_judged_alike(header: int, place: int, value: int, length: int | None) -> None:
    """The changed header has the right checksum: whoever has read it has compared one."""
    data = bytearray(SAMPLE)
    data[header + place] = value
    data[header + 148 : header + 156] = b" " * 8
    checksum = sum(data[header : header + BLOCK])
    data[header + 148 : header + 156] = b"%06o\0 " % checksum
    assert_judged_alike(bytes(data[:length]))
