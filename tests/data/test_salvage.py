"""A damaged shard keeps every sample that the damage does not touch, and names the others."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinodit.data.index import ManifestError, build_index
from kinodit.data.indexing import IndexOptions, index_shards
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardReader
from kinodit.data.salvage import salvage
from kinodit.data.tar import members
from kinodit.launch.cli import main
from tests.data.clips import small_records, write_dataset
from tests.data.shards import picture, tar_bytes, write_tar

KEYS = [f"s{number:02d}" for number in range(8)]
FILES = [(f"{key}.{name}", data) for key in KEYS for name, data in (
    ("json", b'{"caption": "%s"}' % key.encode()), ("png", picture(int(key[1:]))), ("txt", b"t"),
)]  # fmt: skip
GOOD = tar_bytes(FILES)
END = [member.end for member in members(GOOD, whole=True)][-1]
HEADERS = [(member.name, member.start) for member in members(GOOD, whole=True)]


def kept(path: Path, data: bytes) -> tuple[list[str], list[tuple[int, str, str]]]:
    path.write_bytes(data)
    index, damages = salvage(path)
    found = []
    for row in index:
        span = data[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
        names = [member.name for member in members(span, whole=False)]
        assert len({name.partition(".")[0] for name in names}) == 1 and len(names) == 3
        found.append(names[0].partition(".")[0])
    return found, [(damage.offset, damage.key, damage.reason) for damage in damages]


def test_a_whole_shard_is_indexed_as_ever(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    index, damages = salvage(path)
    assert damages == [] and index.tobytes() == build_index(path).tobytes()


@pytest.mark.parametrize(("name", "offset"), HEADERS)
@pytest.mark.parametrize("place", [0, 130, 150, 258])
def test_a_damaged_header_anywhere_loses_its_sample_only(
    tmp_path: Path, name: str, offset: int, place: int
) -> None:
    data = bytearray(GOOD)
    data[offset + place] ^= 0x40
    found, damages = kept(tmp_path / "a.tar", bytes(data))
    lost = name.partition(".")[0]
    assert found == [key for key in KEYS if key != lost]
    assert any(where == offset and "header" in why for where, _, why in damages)
    if place:
        assert (offset, lost) in [(where, key) for where, key, _ in damages]


def test_a_shard_that_was_cut_off_keeps_what_was_before(tmp_path: Path) -> None:
    cut = HEADERS[16][1] + 700
    found, damages = kept(tmp_path / "a.tar", GOOD[:cut])
    assert found == KEYS[:5] and "cut off" in damages[-1][2]


def test_what_is_no_sample_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    files = [
        *FILES[:3],
        ("bad.pkl", b"cos\nsystem\n"),
        *FILES[3:6],
        ("../../x.png", picture()),
        *FILES[6:9],
        *[("twice.png", picture()), ("twice.png", picture())],
        *FILES[9:12],
        ("deep.json", b"[" * 100_000),
        ("deep.png", picture()),
        *FILES[12:15],
        ("s00.extra.safetensors", b""),
    ]
    path = write_tar(tmp_path / "a.tar", files)
    index, damages = salvage(path)
    reasons = {damage.key: damage.reason for damage in damages}
    assert len(index) == 4, "s00 is there twice, so that neither is known to be whole"
    assert "'pkl' is not allowed" in reasons["bad"]
    assert "nested more than 32 deep" in reasons["deep"]
    assert "not allowed" in reasons[""]
    assert "twice" in reasons["s00"] and "twice" in reasons


def test_garbage_is_no_shard_and_no_crash(tmp_path: Path) -> None:
    for data in (b"", b"x" * 5000, GOOD[7:], bytes(512) + GOOD):
        assert kept(tmp_path / "a.tar", data)[1]
    with pytest.raises(ManifestError, match="cannot be read"):
        salvage(tmp_path / "none.tar")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, END - 1), st.integers(1, 255)), max_size=3))
def test_damage_never_loses_a_sample_that_it_does_not_touch(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(GOOD)
    for place, change in changes:
        data[place] ^= change
    starts = [start for name, start in HEADERS if name.endswith(".json")]
    ends = [*starts[1:], END]
    untouched = {
        key
        for key, start, end in zip(KEYS, starts, ends, strict=True)
        if data[start:end] == GOOD[start:end]
    }
    path = tmp_path_factory.mktemp("s") / "a.tar"
    path.write_bytes(data)
    index, _ = salvage(path)
    whole = {
        key
        for key, start, end in zip(KEYS, starts, ends, strict=True)
        if any(int(r["offset"]) == start and int(r["size"]) == end - start for r in index)
    }
    assert untouched <= whole


def test_the_command_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(GOOD)
    data[HEADERS[4][1] + 130] ^= 0x40
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert len(archive.getnames()) == 4, "a common reader ends there without a word"
    assert main(["data", "index", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path), "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert f"left out: a.tar: sample 's01' at byte {HEADERS[4][1]}" in captured.err
    assert "7 samples in 1 shard(s)" in captured.out
    dataset = Dataset(tmp_path)
    assert [ShardReader(dataset).read(i).key for i in range(7)] == [*KEYS[:1], *KEYS[2:]]
    assert index_shards(tmp_path, "x", IndexOptions(skip_bad=True)).manifest.num_samples == 7


def test_a_sample_beside_damage_is_kept_though_no_other_has_its_members(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", small_records(5), shard_bytes=1 << 20)
    path, offset, _ = dataset.locate(3)
    data = bytearray(path.read_bytes())
    data[offset + 130] ^= 0x40
    path.write_bytes(data)
    index, damages = salvage(path)
    assert [int(row["offset"]) for row in index] == [dataset.locate(n)[1] for n in (0, 1, 2, 4)]
    assert {damage.key for damage in damages} == {"s0003"}
