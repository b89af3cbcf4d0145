"""Datasets on disk: random access, the content hash, and what is refused on opening."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kinodit.data.index import INDEX_DTYPE, index_row, read_span, spans
from kinodit.data.indexing import IndexOptions, index_shards
from kinodit.data.manifest import (
    _ROW,
    Dataset,
    Manifest,
    ManifestError,
    ShardEntry,
    build_index,
)
from kinodit.data.reader import ShardReader
from kinodit.data.record import MODALITIES, RecordMeta
from tests.data.shards import image_record, write_images


def test_a_row_takes_36_bytes_and_nothing_is_padded() -> None:
    assert INDEX_DTYPE.itemsize == 36
    assert MODALITIES == ("video", "image", "audio")


def test_rows_are_unpacked_as_numpy_reads_them() -> None:
    data = np.random.default_rng(0).bytes(36 * 9)
    for number, row in enumerate(np.frombuffer(data, INDEX_DTYPE)):
        assert _ROW.unpack_from(data, 36 * number) == row.item()


def test_every_sample_is_found_at_its_offset(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    assert len(dataset) == 12
    assert len(dataset.manifest.shards) > 2
    for index in (11, 0, 5, 4, 11):
        path, offset, size = dataset.locate(index)
        data = path.read_bytes()[offset : offset + size]
        (span,) = spans(data, whole=False)
        record = read_span(data, span)
        assert record.key == f"image-{index:03d}"
        assert record == image_record(index)
        assert dataset.row(index) == index_row(record.meta, offset, memoryview(data))
    for outside in (-1, 12):
        with pytest.raises(IndexError, match=f"sample {outside} of dataset 'd' with 12"):
            dataset.row(outside)


def test_a_shard_of_which_all_samples_are_left_out_hides_none(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    first, second, *_ = dataset.manifest.shards
    behind = first.num_samples + second.num_samples
    keys = frozenset(image_record(index).key for index in range(first.num_samples, behind))
    index_shards(tmp_path / "d", "d", IndexOptions(without={second.file: keys}))
    found = Dataset(tmp_path / "d")
    assert found.manifest.shards[1].num_samples == 0
    for index, wanted in enumerate([*range(first.num_samples), *range(behind, 12)]):
        assert ShardReader(found).read(index) == image_record(wanted)


def test_the_index_of_the_writer_is_that_of_reading_the_shard(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    for shard in dataset.manifest.shards:
        built = build_index(tmp_path / "d" / shard.file)
        assert built.tobytes() == (tmp_path / "d" / shard.index_file).read_bytes()
    sizes = dataset.column("size")
    assert sizes.tolist() == [dataset.row(index).size for index in range(12)]


def test_rows_keep_what_the_planner_filters_on() -> None:
    meta = RecordMeta(
        id="x", modality="video", width=1920, height=1080, fps=29.97, num_frames=120,
        duration_s=4.004, has_audio=True,
    )  # fmt: skip
    row = index_row(meta, 512, memoryview(b"abc"))
    assert (row.width, row.height, row.num_frames) == (1920, 1080, 120)
    assert (row.fps_milli, row.duration_ms, row.size, row.offset) == (29970, 4004, 3, 512)
    assert row.has_audio
    assert row.modality_name == "video"
    assert np.array([row], INDEX_DTYPE)[0].item() == tuple(row)


def test_the_content_hash_is_of_bytes_and_order_not_of_names(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    assert write_images(tmp_path / "other").content_hash == dataset.content_hash
    assert write_images(tmp_path / "fewer", count=11).content_hash != dataset.content_hash
    manifest = dataset.manifest
    renamed = [replace(shard, file=f"9{shard.file}") for shard in manifest.shards]
    assert Manifest.of("renamed", renamed).content_hash == dataset.content_hash
    turned = Manifest.of("d", tuple(reversed(manifest.shards)))
    assert turned.content_hash != dataset.content_hash


def test_a_missing_or_cut_off_file_is_named_on_opening(tmp_path: Path) -> None:
    original = tmp_path / "d"
    write_images(original)
    for name in ("000001.tar", "000001.idx"):
        copy = tmp_path / f"missing-{name}"
        shutil.copytree(original, copy)
        (copy / name).unlink()
        with pytest.raises(ManifestError, match=f"{name} is missing"):
            Dataset(copy)
        shutil.copy(original / name, copy)
        size = (copy / name).stat().st_size
        with (copy / name).open("r+b") as file:
            file.truncate(size - 36)
        with pytest.raises(ManifestError, match=f"{name} has {size - 36} bytes.*says {size}"):
            Dataset(copy)


def test_an_index_that_was_changed_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "d")
    path = tmp_path / "d" / "000000.idx"
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"000000\.idx is not the index"):
        Dataset(tmp_path / "d")


def num_mapped(directory: Path) -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(directory) in line and line.endswith(".idx") for line in maps)


def test_no_more_indexes_are_mapped_than_a_process_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = write_images(tmp_path / "d")
    rows = [every.row(index) for index in range(12)]
    del every
    monkeypatch.setattr("kinodit.data.manifest.MAX_MAPPED", 2)
    dataset = Dataset(tmp_path / "d")
    assert len(dataset.manifest.shards) > 2
    assert [dataset.row(index) for index in range(12)] == rows
    assert dataset.column("offset").tolist() == [row.offset for row in rows]
    assert num_mapped(tmp_path) == 2
    last = tmp_path / "d" / dataset.manifest.shards[-1].index_file
    last.write_bytes(bytes(last.stat().st_size))
    dataset = Dataset(tmp_path / "d")
    assert dataset.row(0) == rows[0]
    with pytest.raises(ManifestError, match=f"{last.name} is not the index"):
        dataset.row(11)


def edited(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SHARD = {"file": "a.tar", "num_samples": 1, "num_bytes": 1, "index_sha256": "0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "not a manifest of schema 1 or 2"),
        ({"shards": [SHARD]}, "either sha256 or blake3"),
        ({"shards": [{**SHARD, "sha256": "0", "blake3": "0"}]}, "either sha256 or blake3"),
        (
            {"shards": [{**SHARD, "sha256": "0"}, {**SHARD, "blake3": "0"}]},
            "'a.tar' must have either sha256 or blake3, like all others",
        ),
        ({"shards": [{**SHARD, "blake3": 7}]}, "a field of a wrong type"),
        ({"content_hash": "00"}, "its content hash is"),
        ({"shards": [{"file": "a.tar"}]}, "does not have the fields"),
        ({"shards": 3}, "does not have the fields"),
        ({"name": ""}, "'name' is ''"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_images(tmp_path / "d")
    edited(tmp_path / "d", **changes)
    with pytest.raises(ManifestError, match=message):
        Dataset(tmp_path / "d")


@pytest.mark.parametrize(
    "name", ["../000000.tar", "/etc/passwd", "pipe:touch x", "a/b.tar", "s3://x/000000.tar", ".."]
)
def test_names_in_a_manifest_never_become_paths(tmp_path: Path, name: str) -> None:
    Manifest.of("d", [ShardEntry(name, 1, 1, "", "")]).save(tmp_path)
    with pytest.raises(ManifestError, match="not a plain file name"):
        Dataset(tmp_path)


def test_a_folder_without_manifest_or_samples_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json.*kinodit data pack"):
        Dataset(tmp_path)
    Manifest.of("d", []).save(tmp_path)
    with pytest.raises(ManifestError, match="is empty"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="cannot be read"):
        Dataset(tmp_path)
