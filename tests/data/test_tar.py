"""Archives that streaming readers take for shorter ones, or for harmless: each is an error."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.manifest import ManifestError, build_index
from kinodit.data.tar import BLOCK, TarError, members, named_members
from tests.data.shards import picture, tar_bytes, write_tar


def named(data: bytes, *, whole: bool = True) -> list[tuple[object, ...]] | str:
    """What the reader for indexes finds."""
    try:
        return list(named_members(data, whole=whole))
    except TarError as error:
        return str(error)


def named_by_all(data: bytes, *, whole: bool = True) -> list[tuple[object, ...]] | str:
    """The same of the general reader alone."""
    with patch("kinodit.data.tar._plain_member", return_value=None):
        try:
            found = list(members(data, whole=whole))
        except TarError as error:
            return str(error)
    return [(*member.name.partition(".")[::2], *member[1:]) for member in found]


def listed(data: bytes) -> list[tuple[str, bytes]]:
    return [
        (member.name, data[member.data : member.data + member.size])
        for member in members(data, whole=True)
    ]


FILES = [("a.png", b"x" * 700), ("a.txt", b"hello"), ("b.png", b""), ("b.txt", b"y" * 512)]


FORMATS: dict[int, dict[str, object]] = {
    tarfile.USTAR_FORMAT: {"mtime": 1},
    tarfile.PAX_FORMAT: {"mtime": 1.5},
    tarfile.GNU_FORMAT: {"mtime": 1},
}


def archive(format_: int, **changes: object) -> bytes:
    """FILES as Python's tarfile writes them; `changes` replace fields of all headers."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format_) as opened:
        for name, data in FILES:
            header = tarfile.TarInfo(name)
            header.size, header.uname = len(data), "someone"
            for key, value in {**FORMATS[format_], **changes}.items():
                setattr(header, key, value)
            opened.addfile(header, io.BytesIO(data))
    return target.getvalue()


@pytest.mark.parametrize("format_", FORMATS)
def test_plain_archives_of_any_dialect_are_read_like_tarfile_does(format_: int) -> None:
    data = archive(format_)
    assert listed(data) == FILES
    found = named(data)
    assert found == named_by_all(data)
    # Two blocks of a PAX header are before each.
    extra = 2 * BLOCK if format_ == tarfile.PAX_FORMAT else 0
    assert found[0] == ("a", "png", 0, BLOCK + extra, 700, BLOCK + extra + 1024)


@pytest.mark.parametrize("format_", FORMATS)
def test_what_most_tools_write_needs_no_general_reader(format_: int) -> None:
    with patch("kinodit.data.tar._read_member", side_effect=AssertionError):
        assert len(list(named_members(archive(format_), whole=True))) == len(FILES)


@pytest.mark.parametrize(
    ("format_", "changes"),
    [
        (tarfile.PAX_FORMAT, {"pax_headers": {"comment": "x"}}),
        (tarfile.PAX_FORMAT, {"pax_headers": {"path": "c.png"}}),
        (tarfile.PAX_FORMAT, {"mtime": 1, "pax_headers": {"mtime": "1e5"}}),
        (tarfile.PAX_FORMAT, {"mtime": 1e-300}),
        (tarfile.PAX_FORMAT, {"mtime": 1, "pax_headers": {"comment": "x" * 700}}),
        (tarfile.PAX_FORMAT, {"mtime": 1}),
        (tarfile.PAX_FORMAT, {"mtime": -1.25}),
        (tarfile.PAX_FORMAT, {"uname": "J\u00fcrgen"}),
        (tarfile.USTAR_FORMAT, {"uname": "J\u00fcrgen"}),
        (tarfile.USTAR_FORMAT, {"type": tarfile.AREGTYPE}),
        (tarfile.USTAR_FORMAT, {"type": tarfile.SYMTYPE}),
        (tarfile.USTAR_FORMAT, {"name": "noextension"}),
        (tarfile.USTAR_FORMAT, {"name": "A.B"}),
        (tarfile.USTAR_FORMAT, {"name": "d" * 90 + "/" + "k" * 90 + ".png"}),
        (tarfile.GNU_FORMAT, {"uname": "J\u00fcrgen"}),
        (tarfile.GNU_FORMAT, {"name": "k" * 120 + ".png"}),
    ],
)
def test_headers_of_other_kinds_are_read_alike(format_: int, changes: dict[str, object]) -> None:
    data = archive(format_, **changes)
    assert named(data) == named_by_all(data)


def outcome(data: bytes) -> list[tuple[str, bytes]] | str:
    try:
        return listed(data)
    except TarError as error:
        return str(error)


EDGES = [0, 99, 124, 134, 135, 148, 153, 154, 155, 156, 257, 262, 263, 264, 345]
"""First and last bytes of the fields of a header that are read."""


@given(
    place=st.sampled_from(EDGES) | st.integers(0, BLOCK - 1),
    value=st.sampled_from(b"\0 0178x") | st.integers(0, 255),
    is_signed=st.booleans(),
)
@settings(max_examples=300)
def test_headers_of_plain_files_are_judged_like_all_others(
    place: int, value: int, is_signed: bool
) -> None:
    """They are read with fewer steps. is_signed: the changed header has the right checksum."""
    data = bytearray(tar_bytes(FILES))
    data[place] = value
    if is_signed:
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    with patch("kinodit.data.tar._plain_member", return_value=None):
        expected = outcome(bytes(data))
    assert outcome(bytes(data)) == expected


def test_pax_headers_of_times_of_any_length_are_read_in_one_step() -> None:
    times = [1.5, 1.25, 1700000000.123456, 1.5, 1700000000.12]
    parts = [archive(tarfile.PAX_FORMAT, mtime=time) for time in times]
    end = next(members(parts[0], whole=True)).end
    data = b"".join(part[:end] for part in parts) + bytes(2 * BLOCK)
    expected = named_by_all(data)
    assert isinstance(expected, list) and len(expected) == len(times)
    with patch("kinodit.data.tar._read_member", side_effect=AssertionError):
        assert named(data) == expected


def test_a_checksum_is_no_remainder() -> None:
    """Adler-32, of which it is taken, counts modulo 65521; a sum of that and more is possible."""
    data = bytearray(archive(tarfile.USTAR_FORMAT))
    for start, end in ((157, 257), (265, 345), (346, BLOCK)):
        data[start:end] = b"\xff" * (end - start)
    data[148:156] = b" " * 8
    total = sum(data[:BLOCK])
    assert total > 65521
    for said in (total, total - 65521):
        data[148:156] = b"%06o\0 " % said
        assert named(bytes(data)) == named_by_all(bytes(data))


def test_members_above_the_limit_are_refused_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinodit.data.tar.MAX_MEMBER_BYTES", 600)
    for format_ in FORMATS:
        data = archive(format_)
        found = named(data)
        assert found == named_by_all(data) and "700 bytes; 600 are allowed" in found


@given(
    format_=st.sampled_from(list(FORMATS)),
    block=st.integers(0, 8),
    place=st.sampled_from([*EDGES, *range(32)]) | st.integers(0, BLOCK - 1),
    value=st.sampled_from(b"\0 0178x=\n.") | st.integers(0, 255),
    is_signed=st.booleans(),
    length=st.none() | st.integers(0, 6 * BLOCK),
    whole=st.booleans(),
)
@settings(max_examples=600)
def test_damage_to_any_block_is_judged_as_by_the_general_reader(
    format_: int,
    block: int,
    place: int,
    value: int,
    is_signed: bool,
    length: int | None,
    whole: bool,
) -> None:
    """The headers of PAX and their contents, too."""
    data = bytearray(archive(format_))
    start = block * BLOCK
    data[start + place] = value
    if is_signed:
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + BLOCK])
    cut = bytes(data[:length])
    assert named(cut, whole=whole) == named_by_all(cut, whole=whole)


def test_members_are_adjacent_and_cover_the_archive() -> None:
    data = tar_bytes(FILES)
    found = list(members(data, whole=True))
    assert [member.start for member in found[1:]] == [member.end for member in found[:-1]]
    assert found[0].start == 0
    assert data[found[-1].end :].count(0) == len(data) - found[-1].end


def test_names_longer_than_ustar_allows_come_from_the_pax_header() -> None:
    name = "k" * 128 + ".latent.safetensors"
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    (member,) = members(target.getvalue(), whole=True)
    assert member.name == name
    assert member.start == 0


def test_an_archive_cut_off_anywhere_is_an_error_that_says_where(tmp_path: Path) -> None:
    data = tar_bytes([(f"{key}.png", picture()) for key in "abc"])
    end = [member.end for member in members(data, whole=True)][-1]
    path = tmp_path / "000000.tar"
    for length in [1, 511, 512, 600, 1024, 1500, end - 1, end, end + 512]:
        path.write_bytes(data[:length])
        with pytest.raises(ManifestError, match=r"000000\.tar: .*byte \d+"):
            build_index(path)
    path.write_bytes(b"")
    with pytest.raises(ManifestError, match="empty"):
        build_index(path)


def test_a_damaged_header_in_the_middle_does_not_end_the_archive_quietly(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([(f"{key}.png", picture()) for key in "abcdef"]))
    third = list(members(bytes(data), whole=True))[2].start
    data[third + 3] ^= 0x40
    path = tmp_path / "000000.tar"
    path.write_bytes(data)
    # What streaming readers build on: it reads two members and reports nothing.
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 2
    with pytest.raises(ManifestError, match=rf"000000\.tar: .*byte {third} is damaged"):
        build_index(path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_only_regular_files_are_members(kind: bytes) -> None:
    header = tarfile.TarInfo("a.png")
    header.type, header.linkname = kind, "/etc/passwd"
    data = header.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * BLOCK)
    with pytest.raises(TarError, match="only regular files"):
        list(members(data, whole=True))


def test_a_header_that_claims_60_gib_is_refused_without_reading_them() -> None:
    header = tarfile.TarInfo("a.png")
    header.size = 60 << 30
    start = time.monotonic()
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(TarError):
            list(members(header.tobuf(dialect) + bytes(2 * BLOCK), whole=True))
    header.size = 1 << 31
    with pytest.raises(TarError, match="claims 2147483648 bytes"):
        list(members(header.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * BLOCK), whole=True))
    assert time.monotonic() - start < 1


def test_compressed_archives_are_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    path.write_bytes(gzip.compress(tar_bytes([("a.png", bytes(10_000_000))])))
    with pytest.raises(ManifestError, match=r"no tar header at byte 0|damaged"):
        build_index(path)


def test_bytes_behind_the_end_are_not_ignored() -> None:
    one = tar_bytes(FILES)
    with pytest.raises(TarError, match="bytes after its end-of-archive marker"):
        list(members(one + one, whole=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../../../etc/x.png"], "not allowed"),
        (["/abs/y.png"], "sample key '/abs/y'"),
        (["dir/a.png"], "sample key 'dir/a'"),
        (["a.png", "b.png", "a.txt"], "'a' at byte 2048 was there before"),
        (["a.png", "a.png"], "'a' has two members 'png'"),
        (["clip.v1.mp4"], "member 'v1.mp4'"),
        (["A.png"], "sample key 'A'"),
        (["a.pkl"], "member 'pkl'"),
        (["noextension"], "member ''"),
        ([".png"], "sample key ''"),
    ],
)
def test_names_that_readers_stumble_over_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    path = write_tar(tmp_path / "000000.tar", [(name, picture()) for name in names])
    with pytest.raises(ManifestError, match=message):
        build_index(path)


def test_a_pickle_in_a_shard_is_never_loaded(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    payload = f"cos\nsystem\n(S'touch {witness}'\ntR.".encode()
    for extension in ("pkl", "pyd", "pth", "npy"):
        path = write_tar(tmp_path / "000000.tar", {"a.png": picture(), f"a.{extension}": payload})
        with pytest.raises(ManifestError, match="not allowed"):
            build_index(path)
    assert not witness.exists()


@given(st.binary(max_size=2000))
def test_random_bytes_are_an_error_and_nothing_else(data: bytes) -> None:
    if not data.strip(b"\0"):
        return
    with pytest.raises(TarError):
        list(members(data, whole=True))


GOOD = tar_bytes(FILES)


@given(st.integers(0, 6 * BLOCK - 1), st.integers(1, 255))
def test_a_changed_byte_is_read_or_refused_but_never_crashes(place: int, change: int) -> None:
    data = bytearray(GOOD)
    data[place] ^= change
    try:
        found = listed(bytes(data))
    except TarError:
        return
    assert [name for name, _ in found] == [name for name, _ in FILES]


def test_damaged_pax_headers_are_refused() -> None:
    def with_pax(text: bytes) -> bytes:
        head = tarfile.TarInfo("pax")
        head.type, head.size = tarfile.XHDTYPE, len(text)
        body = text + bytes(-len(text) % BLOCK)
        file = tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT)
        return head.tobuf(tarfile.USTAR_FORMAT) + body + file + bytes(2 * BLOCK)

    assert next(iter(members(with_pax(b"14 path=b.png\n"), whole=True))).name == "b.png"
    for text in (
        b"99 path=b.png\n",
        b"path=b.png\n",
        b"14 path=b.png ",
        b"\xff" * 20,
        b"10 size=x\n",
    ):
        with pytest.raises(TarError, match="PAX header"):
            list(members(with_pax(text), whole=True))
