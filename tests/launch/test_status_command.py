"""`kinodit status`: a run in a few lines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from kinodit.launch import cli
from kinodit.launch.report.page import write_report
from kinodit.trainer.resilience.goodput import Ledger
from kinodit.trainer.resilience.lock import RunLock


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty steps, of which ten were lost to a crash, and a lock."""
    (tmp_path / "config.yaml").write_text("run: {name: demo, steps: 40}\n")
    ranks = [
        {"rank": 1, "busy_s": 0.5, "data_wait_s": 0.1, "collective_wait_s": 0.0},
        {"rank": 0, "busy_s": 0.4, "data_wait_s": 0.1, "collective_wait_s": 0.1},
    ]
    rows = [
        {"kind": "train", "step": step, "time_s": 5.0, "loss": 1.0, "step_s": 0.5, "ranks": ranks}
        for step in (10, 20)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [
        {"kind": "event", "time_s": 1.0, "step": 0, "event": "start", "message": "2 rank(s)"},
        {"kind": "event", "time_s": 2.0, "step": 20, "event": "hang", "message": "rank 1 hangs"},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    for step in (0, 10):
        ledger = Ledger(tmp_path, step, time.time())
        ledger.begin()
        ledger.add(step + 10, 10.0, {"compute": 8.0, "data": 1.0, "checkpoint": 0.5})
        if step == 0:
            ledger.add(20, 10.0, {"compute": 9.0})
        ledger.close()
    return tmp_path


def test_says_what_the_time_was_spent_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run, "4711", 0):
        assert cli.main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "demo: " in said
    assert "20 of 40" in said
    assert "of job 4711" in said
    # 16 of 30 seconds: 9 were lost, 2 waited, 1 saved, 2 nobody knows.
    assert "goodput     53.3 %" in said
    assert "lost steps  30.0 %" in said
    assert "starts 2, steps taken twice 10, hangs 1" in said
    assert "rank 1 hangs" in said


def test_prints_json_for_scripts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["goodput"] == pytest.approx(16 / 30, abs=0.01)
    assert (document["step"], document["total_steps"], document["lock"]) == (20, 40, "")
    assert document["seconds"]["num_lost_steps"] == 10


def test_a_run_without_an_account_has_a_status(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "time.jsonl").unlink()
    assert cli.main(["status", str(run)]) == 0
    assert "goodput" not in capsys.readouterr().out


def test_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    assert cli.main(["status", str(tmp_path / "none")]) == 2


def test_the_report_shows_the_time(run: Path) -> None:
    page = write_report(run).read_text()
    assert "53.3 % goodput" in page
    assert "spent-lost_steps" in page
    assert "500 ms" in page
    (run / "time.jsonl").unlink()
    assert 'id="time"' not in write_report(run).read_text()
