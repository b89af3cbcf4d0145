"""Which rank a launcher says this process is, and how many share its node."""

from __future__ import annotations

import pytest

from kinodit.launch.topology import LaunchError, read_topology

TORCHRUN = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}


def read(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> tuple[int, int, int, int]:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = read_topology()
    return found.rank, found.world_size, found.local_rank, found.ranks_per_node


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, TORCHRUN) == (11, 16, 3, 8)


@pytest.mark.parametrize(
    ("tasks", "expected"), [("8(x2)", 8), ("8", 8), ("8(x1),4(x2)", 8), ("8,4", 8)]
)
def test_srun(tasks: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, {**SRUN, "SLURM_TASKS_PER_NODE": tasks}) == (11, 16, 3, expected)


def test_a_launcher_need_not_say_how_many_share_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, SRUN) == (11, 16, 3, 0)


def test_no_launcher_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, {}) == (0, 1, 0, 0)


def test_half_a_launcher_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LaunchError, match="torchrun set RANK but not WORLD_SIZE, LOCAL_RANK"):
        read_topology()
