"""What the doctor finds, on one machine and between ranks."""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from kinodit.launch.cli import main
from kinodit.launch.doctor import node
from kinodit.launch.doctor.network import absent
from kinodit.launch.doctor.report import Check, RankReport, Verdict, table
from tests.support.ranks import ROOT

Usage = namedtuple("Usage", "total used free")


def test_a_healthy_machine_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passed = tmp_path / "passed"
    passed.mkdir()
    code = main(["doctor", "--folder", str(tmp_path / "run"), "--passed", str(passed)])
    said = capsys.readouterr().out
    assert code == 0
    assert said.startswith("kinodit doctor: 1 node(s), 1 rank(s): ")
    for name in ("versions", "backends", "gpus", "extras", "disk", "permissions", "limits"):
        assert f"  {name}" in said
    assert f"torch {torch.__version__}" in said
    assert len(list(passed.iterdir())) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("free", "verdict"),
    [(2**29, Verdict.FAIL), (2 * 2**30, Verdict.WARN), (2**40, Verdict.PASS)],
)
def test_free_space_decides(
    free: int, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**41, 0, free))
    assert node.disk(tmp_path).verdict is verdict


def test_a_folder_that_cannot_be_written_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    passed = tmp_path / "passed"
    passed.mkdir()
    assert main(["doctor", "--folder", str(tmp_path), "--passed", str(passed)]) == 1
    said = capsys.readouterr().out
    assert "fail  permissions  cannot write in" in said and "Permission denied" in said
    assert list(passed.iterdir()) == []


def test_a_folder_that_all_may_write_is_a_warning(tmp_path: Path) -> None:
    assert node.permissions(tmp_path).verdict is Verdict.PASS
    tmp_path.chmod(0o777)
    found = node.permissions(tmp_path)
    assert found.verdict is Verdict.WARN and "chmod o-w" in found.found


def test_fewer_gpus_than_granted_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    found = node.gpus(0, 8)
    assert found.verdict is Verdict.FAIL and "7 of the 8" in found.found
    assert node.gpus(7, 0).verdict is Verdict.FAIL


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    assert node.limits().verdict is Verdict.WARN


def test_the_table_says_where_nodes_differ() -> None:
    def report(rank: int, name: str, found: str, verdict: Verdict = Verdict.PASS) -> RankReport:
        return RankReport(
            rank, name, (Check("same", Verdict.PASS, "x"), Check("d", verdict, found))
        )

    said = table([report(0, "a", "1"), report(1, "a", "1"), report(2, "b", "2", Verdict.FAIL)])
    assert said.splitlines() == [
        "kinodit doctor: 2 node(s), 3 rank(s): fail",
        "pass  same  x",
        "fail  d     b: 2",
        "pass  d     a: 1",
    ]


def test_reports_travel_unchanged() -> None:
    report = RankReport(3, "n", (Check("disk", Verdict.WARN, "a\nb"),))
    assert RankReport.from_json(report.to_json()) == report


def test_ranks_that_did_not_come_are_named() -> None:
    found = absent([RankReport(rank, "n", ()) for rank in (0, 2)], 4)
    assert found.verdict is Verdict.FAIL and found.found == "did not come: rank 1, 3 of 4"


def doctor(rank: int, world_size: int, port: int, *options: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT / "src"),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "kinodit", "doctor", *options],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.gloo
def test_ranks_meet_and_measure(tmp_path: Path, free_port: int) -> None:
    ranks = [doctor(rank, 3, free_port, "--folder", str(tmp_path)) for rank in range(3)]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    for line in ("all 3 came", "clocks", "agree", "sums", "right", "GB/s each way"):
        assert line in said[0]
    assert said[1] == said[2] == ""


@pytest.mark.gloo
@pytest.mark.slow
def test_a_rank_that_does_not_come_is_not_waited_for(tmp_path: Path, free_port: int) -> None:
    options = ("--folder", str(tmp_path), "--passed", str(tmp_path), "--deadline", "45")
    ranks = [doctor(rank, 3, free_port, *options) for rank in (0, 2)]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "did not come: rank 1 of 3" in said[0]
    # The node itself is fit: it is not this one that the job must stay away from.
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 1
