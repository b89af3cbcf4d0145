"""`kinodit checkpoint`, as an engineer types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinodit.launch.cli import main
from kinodit.trainer.checkpoint import find_checkpoints, step_of
from tests.support.checkpoints import save


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save(tmp_path, 1, 2, 3)
    return tmp_path


def test_good_ones_are_listed_and_described(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "ls", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"step-{step:08d}" for step in (1, 2, 3)]
    assert all("whole" in line for line in lines) and lines[-1].endswith("latest")
    assert main(["checkpoint", "inspect", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "step 3, 12 samples, 27 tokens" in out and "world_size 1" in out
    assert "__0_0.distcp" in out and ".metadata" in out
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": good") == 3


def test_a_broken_one_is_named_and_told_by_the_exit_code(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = find_checkpoints(run_dir)[1]
    (path / "state.json").unlink()
    assert main(["checkpoint", "ls", str(run_dir)]) == 0
    assert "step-00000002" in capsys.readouterr().out.split("BROKEN")[0].splitlines()[-1]
    assert main(["checkpoint", "verify", str(run_dir)]) == 1
    out = capsys.readouterr().out
    assert "step-00000002: BROKEN\n  step-00000002/state.json: expected" in out
    assert main(["checkpoint", "verify", str(find_checkpoints(run_dir)[0])]) == 0


def test_old_ones_are_removed_on_request(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkpoint", "prune", str(run_dir), "--keep-last", "1"]
    assert main([*command, "--dry-run"]) == 0
    assert len(find_checkpoints(run_dir)) == 3
    partial = run_dir / "checkpoints" / "quarantine" / "step-00000009.tmp-x"
    partial.mkdir(parents=True)
    assert main(command) == 0
    assert [step_of(path) for path in find_checkpoints(run_dir)] == [3] and partial.exists()
    assert main([*command, "--quarantine"]) == 0
    assert not partial.exists()
    assert "quarantine/step-00000009.tmp-x" in capsys.readouterr().out


@pytest.mark.parametrize("keep_last", ["0", "-1"])
def test_the_last_one_stays(
    keep_last: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "prune", str(run_dir), "--keep-last", keep_last]) == 2
    assert "at least one checkpoint has to stay" in capsys.readouterr().err
    assert len(find_checkpoints(run_dir)) == 3


@pytest.mark.parametrize("verb", ["ls", "inspect", "verify"])
def test_what_is_no_run_is_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", verb, str(tmp_path)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err
