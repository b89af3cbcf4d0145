"""Writing: deterministic, atomic, and read by other tools; foreign shards are indexed in place."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from kinodit.data import writer as writer_module
from kinodit.data.indexing import index_shards
from kinodit.data.manifest import Dataset, ManifestError
from kinodit.data.reader import ShardReader
from kinodit.data.record import Record, RecordError
from kinodit.data.writer import DatasetWriter, WriterError
from tests.data.shards import image_record, picture, write_images, write_tar


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    write_images(tmp_path / "a")
    write_images(tmp_path / "b")
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first.pop("manifest.json").replace(b'"a"', b'"b"') == second.pop("manifest.json")
    assert first == second
    assert len(first) > 4


def test_shards_are_closed_before_they_grow_beyond_their_size(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d", shard_bytes=12_000)
    end_marker = 1024
    assert all(shard.num_bytes <= 12_000 + end_marker for shard in dataset.manifest.shards)
    assert [shard.file for shard in dataset.manifest.shards] == [
        f"{number:06d}.tar" for number in range(len(dataset.manifest.shards))
    ]
    single = write_images(tmp_path / "tiny", count=3, shard_bytes=1)
    assert [shard.num_samples for shard in single.manifest.shards] == [1, 1, 1]


# webdataset leaves the shard's file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_and_tar_read_our_shards(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d", count=4, shard_bytes=1 << 20)
    shard = tmp_path / "d" / "000000.tar"
    samples = list(
        webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("rgb8")
    )
    assert [sample["__key__"] for sample in samples] == [f"image-{n:03d}" for n in range(4)]
    assert samples[2]["txt"] == "colour number 2"
    assert samples[2]["json"]["scores"] == {"number": 2.0}
    assert samples[2]["png"].shape == (16, 16, 3)
    listing = subprocess.run(
        ["tar", "--list", "--verbose", "--utc", "--file", shard], capture_output=True, text=True
    )
    assert listing.returncode == 0
    lines = listing.stdout.splitlines()
    assert len(lines) == 3 * len(dataset)
    assert all("1970-01-01 00:00" in line and " 0/0 " in line for line in lines)


def test_a_shard_of_another_tool_is_indexed_and_read(tmp_path: Path) -> None:
    path = tmp_path / "train-0000.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for number in range(5):
            sink.write(
                {"__key__": f"{number:08d}", "png": picture(number, side=20), "txt": "a square"}
            )
    manifest = index_shards(tmp_path, "foreign").manifest
    dataset = Dataset(tmp_path)
    assert (manifest.num_samples, dataset.name) == (5, "foreign")
    row = dataset.row(3)
    assert (row.height, row.width, row.num_frames, row.modality_name) == (20, 20, 1, "image")
    assert row.caption_chars == len("a square")
    record = ShardReader(dataset).read(3)
    assert record.key == "00000003"
    assert record.members == {"png": picture(3, side=20)}


def test_a_foreign_shard_with_a_broken_medium_names_the_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": picture(), "b.mp4": b"no clip"})
    with pytest.raises(ManifestError, match=r"x\.tar: sample 'b'.*cannot be opened"):
        index_shards(tmp_path, "foreign")
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(WriterError, match="has no shards"):
        index_shards(tmp_path / "nowhere", "foreign")


def test_nothing_is_published_before_the_end_or_after_an_error(tmp_path: Path) -> None:
    destination = tmp_path / "d"
    with DatasetWriter(destination) as writer:
        writer.write(image_record(0))
        assert not destination.exists()
    assert len(Dataset(destination)) == 1

    def fail() -> None:
        with DatasetWriter(tmp_path / "e", shard_bytes=1) as writer:
            writer.write(image_record(0))
            writer.write(image_record(1))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_destination_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WriterError, match="is not an empty folder"):
        DatasetWriter(tmp_path)
    with pytest.raises(WriterError, match="is not an empty folder"):
        DatasetWriter(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert len(write_images(tmp_path / "empty", count=1)) == 1


def test_keys_must_be_unique_and_records_valid(tmp_path: Path) -> None:
    bad = Record("Bad key", image_record(1).meta, {"png": b""})

    def write(*records: Record) -> None:
        with DatasetWriter(tmp_path / "d") as writer:
            for record in records:
                writer.write(record)

    with pytest.raises(RecordError, match="'image-000' occurs twice"):
        write(image_record(0), image_record(0))
    with pytest.raises(RecordError, match="Bad key"):
        write(bad)
    with pytest.raises(WriterError, match="there are no samples"):
        write()
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file that takes `space` bytes, then fails as a full disk does."""

    space = 5000

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        FullDisk.space -= len(data)
        if FullDisk.space < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("space", [0, 5000, 60_000])
def test_a_full_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: int
) -> None:
    create = writer_module.ShardFile.__init__

    def on_full_disk(shard: Any, path: Path) -> None:
        create(shard, path)
        shard._file = FullDisk(shard._file)

    monkeypatch.setattr(FullDisk, "space", space)
    monkeypatch.setattr(writer_module.ShardFile, "__init__", on_full_disk)
    with pytest.raises(WriterError, match=r"the disk is full: .*\.tar could not be written"):
        write_images(tmp_path / "d", count=30)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    with pytest.raises(WriterError, match="the disk is full"):
        write_images(small_disk / "d", count=100)
    assert list(small_disk.iterdir()) == []
    assert len(write_images(small_disk / "d", count=5)) == 5


def test_a_place_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriterError, match="cannot be written"):
        write_images(tmp_path / "file" / "d")
