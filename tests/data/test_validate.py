"""Every fault is found, named and counted; the good samples around it are told apart."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinodit.data.indexing import index_shards
from kinodit.data.manifest import Dataset, Manifest, ManifestError
from kinodit.data.record import Record
from kinodit.data.validate import ValidationReport, validate
from kinodit.data.writer import DatasetWriter
from tests.data.clips import clip_bytes, video_record, write_dataset
from tests.data.shards import image_record, picture, write_images, write_tar


def damage(path: Path, place: int, change: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= change
    path.write_bytes(data)


def lines(report: ValidationReport) -> str:
    return "\n".join(str(problem) for problem in report.problems)


def test_a_sound_dataset_has_no_problems(tmp_path: Path) -> None:
    write_images(tmp_path / "d")
    seen: list[tuple[int, int]] = []
    report = validate(tmp_path / "d", decode=True, progress=lambda *now: seen.append(now))
    assert report == ValidationReport(12, 12, ())
    assert seen[-1] == (12, 12)


def test_a_flipped_bit_of_a_payload_is_one_bad_sample(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    path, offset, _ = dataset.locate(5)
    place = path.read_bytes().index(b"IDAT", offset) + 4
    damage(path, place)
    report = validate(tmp_path / "d")
    assert (report.num_samples, report.num_good) == (12, 11)
    (problem,) = report.problems
    assert (problem.file, problem.key) == (path.name, "image-005")
    assert problem.expected.startswith("CRC-32")


def test_a_damaged_header_costs_one_sample_not_the_rest(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d", shard_bytes=1 << 20)
    path, offset, _ = dataset.locate(3)
    damage(path, offset + 2)
    report = validate(tmp_path / "d")
    assert report.num_good == 11
    assert f"000000.tar: sample 3 at byte {offset}: expected a record" in lines(report)
    assert "damaged" in lines(report)


def test_a_cut_off_shard_says_how_many_samples_are_lost(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d", shard_bytes=1 << 20)
    path, offset, size = dataset.locate(8)
    with path.open("r+b") as file:
        file.truncate(offset + size - 1)
    report = validate(tmp_path / "d")
    assert report.num_good == 8
    assert f"found {offset + size - 1} bytes: it was cut off, 4 of 12 samples are lost" in lines(
        report
    )


def test_missing_files_and_strangers_are_named(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    first, second = dataset.manifest.shards[:2]
    (tmp_path / "d" / first.file).unlink()
    (tmp_path / "d" / second.index_file).unlink()
    write_tar(tmp_path / "d" / "extra.tar", {"a.png": picture()})
    report = validate(tmp_path / "d")
    assert report.num_good == 12 - first.num_samples - second.num_samples
    assert f"No such file or directory: {first.num_samples} samples lost" in lines(report)
    assert f"{second.index_file}: expected the shard's index" in lines(report)
    assert "extra.tar: expected a shard of the manifest" in lines(report)


def test_an_index_that_contradicts_the_records_is_found(tmp_path: Path) -> None:
    write_images(tmp_path / "d", count=2)
    path = tmp_path / "d" / "000000.idx"
    data = bytearray(path.read_bytes())
    data[18] ^= 1
    path.write_bytes(data)
    assert "000000.idx: expected SHA-256" in lines(validate(tmp_path / "d"))
    # An index that was written wrong from the start has the right digest.
    (entry,) = Manifest.load(tmp_path / "d").shards
    Manifest.of("d", [replace(entry, index_sha256=hashlib.sha256(data).hexdigest())]).save(
        tmp_path / "d"
    )
    report = validate(tmp_path / "d")
    assert report.num_good == 1
    assert "image-000: index width: expected 16, found 17" in lines(report)


def test_a_manifest_of_other_shards_is_found(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d", count=2)
    (entry,) = dataset.manifest.shards
    Manifest.of("d", [replace(entry, sha256="0" * 64)]).save(tmp_path / "d")
    report = validate(tmp_path / "d")
    assert f"000000.tar: expected SHA-256 {'0' * 64}, found {entry.sha256}" in lines(report)


def test_a_digest_in_the_record_is_compared(tmp_path: Path) -> None:
    wrong = image_record(0, sha256={"png": "00", "jpg": "11"})
    write_dataset(tmp_path / "d", [wrong])
    report = validate(tmp_path / "d")
    assert "image-000: png: expected SHA-256 00" in lines(report)
    assert "image-000: jpg: expected a member of that name, found none" in lines(report)


def test_decode_opens_every_medium(tmp_path: Path) -> None:
    clip = clip_bytes(12, 12)
    records = [
        video_record("good", clip, 12, 12.0),
        video_record("short", clip, 13, 12.0, duration_s=1.0),
        video_record("wide", clip, 12, 12.0, width=66),
        video_record("noise", b"no clip", 12, 12.0),
        Record("late", image_record(1).meta, {"png": picture()[:40]}),
    ]
    write_dataset(tmp_path / "d", records)
    assert validate(tmp_path / "d").problems == ()
    report = validate(tmp_path / "d", decode=True)
    assert report.num_good == 1
    assert "short: mp4 num_frames: expected 13, found 12" in lines(report)
    assert "wide: mp4 width: expected 66, found 64" in lines(report)
    assert "noise: mp4: expected a medium that opens" in lines(report)
    assert "late: png: expected a medium that opens" in lines(report)


def test_a_foreign_shard_is_valid_and_decodes(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"blue", "b.png": picture(2)})
    index_shards(tmp_path, "foreign")
    assert validate(tmp_path, decode=True) == ValidationReport(2, 2, ())


def test_one_key_in_two_shards_is_found(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, {"same.png": picture()})
    index_shards(tmp_path, "foreign")
    report = validate(tmp_path)
    assert "1.tar: same: expected a key of its own, found that key in 0.tar too" in lines(report)


def test_bytes_behind_the_last_sample_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "d", count=2)
    path = tmp_path / "d" / "000000.tar"
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 6
    damage(path, path.stat().st_size - 1)
    assert "expected the end of the archive" in lines(validate(tmp_path / "d"))


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        validate(tmp_path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, share: float, change: int
) -> None:
    directory = tmp_path_factory.mktemp("data") / "d"
    with DatasetWriter(directory) as writer:
        writer.write(image_record(0))
        writer.write(image_record(1))
    for name in ("000000.tar", "000000.idx"):
        path = directory / name
        place = int(share * path.stat().st_size)
        damage(path, place, change)
        assert validate(directory).problems
        damage(path, place, change)
    assert len(Dataset(directory)) == 2
