"""Parts together find what the whole finds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kinodit.data.indexing import index_shards
from kinodit.data.validate import validate
from kinodit.data.validation_parts import ReportError, merge_reports, parse_part, save_report
from tests.data.shards import write_images


def check_parts(directory: Path, reports: Path, num_parts: int) -> None:
    for index in range(num_parts):
        part = (index, num_parts)
        save_report(reports / f"{index}.json", part, validate(directory, part=part))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 20])
def test_parts_find_what_the_whole_finds(num_parts: int, tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    path, offset, _ = dataset.locate(5)
    data = bytearray(path.read_bytes())
    data[path.read_bytes().index(b"IDAT", offset) + 4] ^= 1
    path.write_bytes(data)
    (tmp_path / "d" / "stranger.tar").write_bytes(b"")
    check_parts(tmp_path / "d", tmp_path / "reports", num_parts)
    merged = merge_reports(tmp_path / "d", tmp_path / "reports")
    whole = validate(tmp_path / "d")
    assert (merged.num_samples, merged.num_good) == (whole.num_samples, whole.num_good) == (12, 11)
    assert set(merged.problems) == set(whole.problems)


def test_a_key_of_two_parts_is_found(tmp_path: Path) -> None:
    write_images(tmp_path / "d")
    names = sorted(path.name for path in (tmp_path / "d").glob("*.tar"))
    shutil.copy(tmp_path / "d" / names[0], tmp_path / "d" / names[1])
    index_shards(tmp_path / "d", "d")
    check_parts(tmp_path / "d", tmp_path / "reports", 2)
    problems = merge_reports(tmp_path / "d", tmp_path / "reports").problems
    assert any(names[0] in str(problem) and names[1] in str(problem) for problem in problems)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "d")
    check_parts(tmp_path / "d", tmp_path / "reports", 3)
    (tmp_path / "reports" / "1.json").unlink()
    with pytest.raises(ReportError, match="3 parts; missing: 1"):
        merge_reports(tmp_path / "d", tmp_path / "reports")
    with pytest.raises(ReportError, match="no report"):
        merge_reports(tmp_path / "d", tmp_path / "nothing")


def test_reports_of_another_state_of_the_dataset_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "d")
    check_parts(tmp_path / "d", tmp_path / "reports", 2)
    shutil.rmtree(tmp_path / "d")
    write_images(tmp_path / "d", count=13)
    with pytest.raises(ReportError, match="12 samples"):
        merge_reports(tmp_path / "d", tmp_path / "reports")


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ReportError, match="must be I/N"):
        parse_part(text)
