"""Rows survive a kill in the middle of a line, and JSON that has no NaN."""

from __future__ import annotations

import errno
import json
import math
from io import FileIO
from pathlib import Path
from typing import Any, cast

import pytest

from kinodit.trainer.jsonl import TAIL_BYTES, JsonLines, read_rows


def test_rows_come_back_and_are_visible_at_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1, "prompt": "ein Känguru", "bins": ((0.0, 0.5),)})
    assert list(read_rows(tmp_path / "m.jsonl")) == [
        {"step": 1, "prompt": "ein Känguru", "bins": [[0.0, 0.5]]}
    ]
    lines.close()


def test_numbers_that_json_lacks_stay_valid_json(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1, "loss": math.nan, "bins": [math.inf, -math.inf, 1.0]})
    lines.close()

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(row["loss"]))
    assert [float(value) for value in row["bins"]] == [math.inf, -math.inf, 1.0]


def test_reopening_drops_a_torn_line_and_unwanted_rows(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"step":3}\n{"step":4,"lo')
    lines = JsonLines(path, lambda row: row["step"] <= 2)
    lines.append({"step": 3, "again": True})
    lines.close()
    assert path.read_text() == '{"step":1}\n{"step":2}\n{"step":3,"again":true}\n'


@pytest.mark.parametrize("num_bytes", [1, TAIL_BYTES - 1, TAIL_BYTES, 3 * TAIL_BYTES])
def test_a_torn_line_goes_however_long_and_takes_no_space(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "m.jsonl"
    for whole in ("", '{"step":1}\n'):
        path.write_text(whole + "x" * num_bytes)
        JsonLines(path).close()
        assert path.read_text() == whole
        assert list(tmp_path.iterdir()) == [path]


def test_reading_names_lines_that_are_not_objects(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1}\n[1]\n\xff\xfe\n{"step":2}\n')
    assert list(read_rows(path)) == [{"step": 1}, None, None, {"step": 2}]


class SmallDisk:
    """A file on a disk that takes `room` bytes more, and then refuses."""

    def __init__(self, file: FileIO) -> None:
        self.file, self.room = file, 0

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "no space")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_what_a_full_disk_refuses_waits_in_order_and_is_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    disk = SmallDisk(lines._file)
    lines._file = cast(Any, disk)
    disk.room = 4
    lines.append({"step": 2})
    lines.append({"step": 3})
    assert path.read_text() == '{"step":1}\n'
    disk.room = 100
    lines.append({"step": 4})
    assert [row["step"] for row in read_rows(path) if row] == [1, 2, 3, 4]
    lines.close()
