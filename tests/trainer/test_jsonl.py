"""Rows survive a kill in the middle of a line, and JSON that has no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

from kinodit.trainer.jsonl import JsonLines, read_rows


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


def test_reading_names_lines_that_are_not_objects(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1}\n[1]\n\xff\xfe\n{"step":2}\n')
    assert list(read_rows(path)) == [{"step": 1}, None, None, {"step": 2}]
