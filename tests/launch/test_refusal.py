"""Of many ranks with the same mistake one tells it, and those with another one tell theirs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kinodit.launch import refusal, topology
from kinodit.models.errors import ConfigError

SAME = "no such key: data.bogus"


class Board:
    """What torchrun's ranks write to each other; `get` of what nobody has written fails."""

    def __init__(self, **known: str) -> None:
        self.known = known

    def set(self, key: str, value: str) -> None:
        self.known[key] = value

    def get(self, key: str) -> bytes:
        if key not in self.known:
            raise RuntimeError("wait timeout")
        return self.known[key].encode()


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "WAIT_S", 0.3)


def told(message: str = SAME, *, lasting: bool = True) -> str:
    stream = io.StringIO()
    refusal.tell(ConfigError(message), lasting=lasting, stream=stream)
    return stream.getvalue()


def test_one_process_tells_its_own() -> None:
    assert told() == f"error: {SAME}\n"


@pytest.mark.parametrize(
    ("rank", "board", "expected"),
    [
        ("0", Board(), f"error: {SAME}\n"),
        ("3", Board(refusal=SAME), ""),
        ("3", Board(refusal="no such file"), f"error on rank 3: {SAME}\n"),
        ("3", Board(), f"error on rank 3: {SAME}\n"),
    ],
    ids=["first", "same", "another", "first has none"],
)
def test_ranks_of_torchrun_compare(
    rank: str, board: Board, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(refusal, "launcher_store", lambda timeout_s: board)
    assert told() == expected
    if rank == "0":
        assert board.known == {"refusal": SAME}


def test_tasks_of_a_batch_script_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "refused.7"
    monkeypatch.setenv("KINODIT_REFUSAL", str(note))
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert told(lasting=False) == f"error on rank 2: {SAME}\n"
    assert not note.exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert told() == f"error: {SAME}\n"
    assert note.read_text() == f"{SAME}\n"
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert told() == ""
    assert told("no GPU") == "error on rank 2: no GPU\n"


def test_a_store_that_is_gone_silences_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(timeout_s: float) -> object:
        raise topology.LaunchError("no MASTER_ADDR")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(refusal, "launcher_store", gone)
    assert told() == f"error on rank 1: {SAME}\n"


def test_torchrun_is_left_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    told()
    left = json.loads((tmp_path / "error.json").read_text())
    assert left["message"] == SAME and left["timestamp"] > 0


def torchrun(*program: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *words, *program], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.gloo
def test_a_mistake_is_told_once_under_torchrun(tmp_path: Path) -> None:
    recipe = tmp_path / "absent.yaml"
    done = torchrun("-m", "kinodit", "train", str(recipe))
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    (line,) = [line for line in lines if line.startswith("error")]
    assert line.startswith("error: ") and str(recipe) in line
    # torchrun shows a traceback of its own; what it says of a rank is the message.
    assert "launch/cli.py" not in done.stderr
    said = [line.partition(": ")[2] for line in lines if line.strip().startswith("traceback :")]
    assert said and set(said) == {line.removeprefix("error: ")}


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_with_different_mistakes_tell_both(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from kinodit.launch.cli import main\n"
        "time.sleep(3 * (os.environ['RANK'] == '0'))\n"
        "sys.exit(main(['train', 'absent-' + os.environ['RANK'] + '.yaml']))\n"
    )
    done = torchrun(str(program))
    told = sorted(line for line in done.stderr.splitlines() if line.startswith("error"))
    assert done.returncode == 1 and len(told) == 2
    assert told[0].startswith("error on rank 1: ") and "absent-1.yaml" in told[0]
    assert told[1].startswith("error: ") and "absent-0.yaml" in told[1]
