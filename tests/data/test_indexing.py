"""Indexing shards of anyone: goes on after a kill, in processes or not; what other tools say."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from PIL import Image

from kinodit.data import indexing
from kinodit.data.index import INDEX_DTYPE, ManifestError
from kinodit.data.indexing import JOURNAL_FILE, IndexOptions, Progress, index_shards
from kinodit.data.manifest import Dataset, Manifest
from kinodit.data.reader import ShardReader
from kinodit.data.validate import validate
from kinodit.data.writer import WriterError
from tests.data.clips import clip_bytes
from tests.data.shards import passing, picture, write_images, write_tar
from tests.support.ranks import ROOT

AS_WRITTEN = IndexOptions(algorithm="sha256")


def indexed_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.idx")}


def unindexed(folder: Path, count: int = 12) -> tuple[Path, bytes]:
    """A folder of four shards without indexes, and the manifest that it should get."""
    write_images(folder, count)
    manifest = (folder / "manifest.json").read_bytes()
    for path in (*folder.glob("*.idx"), folder / "manifest.json"):
        path.unlink()
    return folder, manifest


def test_indexing_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinodit.data.index.PIECE_BYTES", 2000)
    folder, manifest = unindexed(tmp_path / "d")
    script = """
import os, signal, sys
from pathlib import Path
from kinodit.data import indexing
real = indexing.build_index
def build(path, **options):
    if path.name == "000002.tar":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, **options)
indexing.build_index = build
indexing.index_shards(Path(sys.argv[1]), "d", indexing.IndexOptions(algorithm="sha256"))
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, env={"PYTHONPATH": "src"}
    )
    assert killed.returncode == -signal.SIGKILL
    before = indexed_files(folder)
    assert sorted(before) == ["000000.idx", "000001.idx"]
    assert not (folder / "manifest.json").exists()
    seen: list[Progress] = []
    report = index_shards(folder, "d", AS_WRITTEN, seen.append)
    assert report.num_kept == 2
    assert {name: indexed_files(folder)[name] for name in before} == before
    assert (folder / "manifest.json").read_bytes() == manifest
    assert not (folder / JOURNAL_FILE).exists()
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert seen[1].done_bytes == total // 2 and seen[1].num_samples == 6
    assert seen[-1] == Progress(total, total, 12)
    done = [now.done_bytes for now in seen]
    assert done == sorted(done) and len(done) > 6, "it tells of samples within a shard, too"


@pytest.mark.parametrize("change", ["shard", "index", "options", "hash", "line"])
def test_what_is_not_as_it_was_is_indexed_anew(tmp_path: Path, change: str) -> None:
    folder, manifest = unindexed(tmp_path / "d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index_shards(folder, "d", AS_WRITTEN)
    options = AS_WRITTEN
    if change == "shard":
        data = (folder / "000001.tar").read_bytes()
        (folder / "000001.tar").write_bytes(data)
    elif change == "index":
        (folder / "000001.idx").write_bytes(b"x" * 3 * INDEX_DTYPE.itemsize)
    elif change == "options":
        options = replace(AS_WRITTEN, without={"000001.tar": frozenset({"image-004"})})
    elif change == "hash":
        options = IndexOptions(algorithm="blake3")
    else:
        lines = (folder / JOURNAL_FILE).read_text().splitlines()
        (folder / JOURNAL_FILE).write_text("\n".join([lines[0], lines[2], lines[3], lines[1][:40]]))
    report = index_shards(folder, "d", options)
    assert report.num_kept == (0 if change == "hash" else 3)
    if change == "options":
        assert report.manifest.num_samples == 11
        keys = [ShardReader(Dataset(folder)).read(n).key for n in range(11)]
        assert keys == [f"image-{n:03d}" for n in range(12) if n != 4]
    elif change != "hash":
        assert (folder / "manifest.json").read_bytes() == manifest


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_processes_index_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = unindexed(tmp_path / "d")
    monkeypatch.setattr(indexing, "MIN_WORKER_BYTES", 1)
    index_shards(folder, "d", replace(AS_WRITTEN, workers=2))
    assert (folder / "manifest.json").read_bytes() == manifest
    data = bytearray((folder / "000002.tar").read_bytes())
    data[100] ^= 1
    (folder / "000002.tar").write_bytes(data)
    with pytest.raises(ManifestError, match=r"000002\.tar.*damaged"):
        index_shards(folder, "d", IndexOptions(workers=2))
    with pytest.raises(WriterError, match="0 workers"):
        IndexOptions(workers=0)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_new_digests_are_blake3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad: bool
) -> None:
    monkeypatch.setattr("kinodit.data.checksums.PIECE_BYTES", 1200)
    folder, _ = unindexed(tmp_path / "d")
    manifest = index_shards(folder, "d", IndexOptions(skip_bad=skip_bad)).manifest
    for shard in manifest.shards:
        assert shard.blake3 == blake3((folder / shard.file).read_bytes()).hexdigest()
        assert shard.num_bytes == (folder / shard.file).stat().st_size
    document = json.loads((folder / "manifest.json").read_bytes())
    assert document["schema"] == 2 and "sha256" not in document["shards"][0]
    assert Dataset(folder).manifest == manifest
    assert validate(folder).problems == ()
    wrong = [replace(manifest.shards[0], blake3="0" * 64), *manifest.shards[1:]]
    Manifest.of("d", wrong).save(folder)
    (problem,) = validate(folder).problems
    assert problem.expected == f"BLAKE3 {'0' * 64}" and problem.found == manifest.shards[0].blake3


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_manifest_keeps_its_kind_of_digest(tmp_path: Path, is_damaged: bool) -> None:
    folder = write_images(tmp_path / "d", 3).directory
    for algorithm in (None, "blake3", None):
        before = (folder / "manifest.json").read_bytes()
        if is_damaged:
            (folder / "manifest.json").write_bytes(before[:-9])
        manifest = index_shards(folder, "d", IndexOptions(algorithm=algorithm)).manifest
        is_same = (folder / "manifest.json").read_bytes() == before
        assert is_same == (algorithm is None)
    assert manifest.algorithm == "blake3"


def jpeg(number: int, width: int, height: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (width, height), (number * 9 % 256, 20, 90)).save(target, "JPEG")
    return target.getvalue()


def test_a_folder_of_img2dataset(tmp_path: Path) -> None:
    """With what it writes beside the shards, which is no part of the dataset."""
    members: dict[str, bytes] = {}
    for number in range(4):
        key = f"00000{number:04d}"
        document = {
            "caption": f"picture {number}", "url": f"https://example.org/{number}.jpg",
            "key": key, "status": "success", "error_message": None, "width": 32, "height": 24,
            "original_width": 640, "original_height": 480, "exif": "{}", "sha256": "00",
            "similarity": 0.1 * number, "NSFW": "UNLIKELY", "watermarked": False,
        }  # fmt: skip
        members |= {
            f"{key}.jpg": jpeg(number, 32, 24),
            f"{key}.json": json.dumps(document).encode(),
            f"{key}.txt": f"picture {number}".encode(),
        }
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text('{"count": 5, "successes": 4}')
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.MonkeyPatch.context() as patch:
        # The size is said, so that no picture is opened.
        patch.setattr("kinodit.data.indexing.ProbeWorker.probe", interrupt)
        report = index_shards(tmp_path, "laion")
    assert report.manifest.num_samples == 4
    dataset = Dataset(tmp_path)
    assert (dataset.row(2).width, dataset.row(2).height, dataset.row(2).num_frames) == (32, 24, 1)
    meta = ShardReader(dataset).read(2).meta
    assert [caption.text for caption in meta.captions] == ["picture 2"]
    assert meta.source == "https://example.org/2.jpg"
    assert meta.scores == {
        "similarity": 0.2, "watermarked": 0.0, "original_width": 640, "original_height": 480,
    }  # fmt: skip
    assert meta.extra == {"NSFW": "UNLIKELY"}
    assert passing(dataset, "scores.similarity > 0.15 and extra.NSFW == 'UNLIKELY'") == [2, 3]


def test_a_folder_of_video2dataset(tmp_path: Path) -> None:
    """Clips whose size is not believed, sound apart, and one that could not be had."""
    clip = clip_bytes(12, 12)
    failed = {"key": "000000001", "status": "failed_to_download", "error_message": "HTTP 404"}
    meta = {"caption": "bars", "url": "https://example.org/v", "status": "success", "clips": [[0]]}
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000000.json": json.dumps(meta | {"width": 9, "original_width": 9}).encode(),
            "000000000.m4a": b"its sound",
            "000000000.mp4": clip,
            "000000000.txt": b"bars",
            "000000001.json": json.dumps(failed).encode(),
            "000000002_00001.json": json.dumps(meta).encode(),
            "000000002_00001.mp4": clip,
        },
    )
    report = index_shards(tmp_path, "videos")
    (left_out,) = report.left_out
    assert left_out[0] == "00000.tar" and left_out[1].key == "000000001"
    assert "could not get it: failed_to_download (HTTP 404)" in left_out[1].reason
    dataset = Dataset(tmp_path)
    assert [dataset.row(n)[2:6] for n in range(2)] == [(12, 48, 64, 12_000)] * 2
    records = [ShardReader(dataset).read(n) for n in range(2)]
    assert [record.key for record in records] == ["000000000", "000000002_00001"]
    assert all(set(record.members) == {"mp4"} for record in records)
    assert records[1].meta.captions[0].text == "bars"


def test_pictures_with_a_class_are_indexed(tmp_path: Path) -> None:
    # Whose size it is, nobody says: that of the picture counts.
    said = b'{"width": 9, "height": 9}'
    write_tar(tmp_path / "a.tar", {"x.cls": b"7", "x.jpeg": jpeg(1, 20, 10), "x.json": said})
    index_shards(tmp_path, "classes")
    assert Dataset(tmp_path).row(0)[3:5] == (10, 20)


def test_asking_for_a_shard_that_is_not_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.png": picture()})
    with pytest.raises(WriterError, match=r"has no shard b\.tar"):
        index_shards(tmp_path, "d", IndexOptions(files=["b.tar"]))
