"""Maps of the experts' loads, from rows of metrics."""

from __future__ import annotations

import json
from pathlib import Path

from kinodit.launch.report.experts import Cell, expert_maps
from kinodit.launch.report.page import write_report
from kinodit.launch.report.read import Row
from tests.support.fake_run import make_run

NAME = "joint_blocks.2.streams.video.mlp"
LAYER = {
    "load": [0.0, 1.0, 3.0, "NaN"],
    "noise_bins": [[1.5, 0.5], []],
    "modalities": {"video": [2.0, 0.0], "text": []},
    "violation": 2.0,
    "dropped": 0.125,
    "router_grad_norm": 0.01234,
}


def test_the_last_row_that_tells_of_them_is_shown() -> None:
    early: Row = {"experts": {NAME: {"load": [1.0]}}}
    rows: list[Row] = [early, {"experts": {NAME: LAYER}}, {"loss": 1.0}]
    (found,) = expert_maps(rows)
    assert found.name == "video, joint block 2"
    assert found.said == ["largest load 3.00", "12.5 % dropped", "router gradient 0.012"]
    assert found.groups == [
        [("all tokens", [Cell(0.0, 0), Cell(1.0, 50), Cell(3.0, 100), Cell(None, 0)])],
        [("video", [Cell(2.0, 100), Cell(0.0, 0)])],
        [("t 0.0–0.5", [Cell(1.5, 75), Cell(0.5, 25)])],
    ]


def test_rows_without_experts_have_no_map() -> None:
    assert expert_maps([]) == expert_maps([{"loss": 1.0}, {"experts": "x"}]) == []
    (single,) = expert_maps([{"experts": {"single_blocks.0.mlp": {}}}])
    assert (single.name, single.said, single.groups) == ("all streams, single block 0", [], [])


def test_a_page_has_them_if_the_run_has_experts(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", sample_steps=())
    assert 'id="experts"' not in write_report(run_dir).read_text()
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[-1]) | {"kind": "train", "experts": {f"<{NAME}>": LAYER}}
    file.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")
    html = write_report(run_dir).read_text()
    assert 'id="experts"' in html and html.count("<td style=") == 8
    assert "expert 2, all tokens: 3.00" in html and "expert 3, all tokens: –" in html
    assert "12.5 % dropped" in html and "expert 0, video: 2.00" in html
