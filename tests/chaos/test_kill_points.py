"""Killed, or with a full disk, at every point of a save: a good checkpoint is always there."""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from kinodit.trainer import faults
from kinodit.trainer.checkpoint import find_checkpoints, step_of, verify
from tests.chaos.saving import ENDED, FAILED, LAST_STEP, Attempt, start
from tests.support.evidence import add_evidence
from tests.support.sampling import sampled

pytestmark = [pytest.mark.chaos, pytest.mark.gloo, pytest.mark.timeout(3600)]

STRUCK_STEP = 2
POINTS = [point for point in faults.POINTS if point.startswith("checkpoint:")]
OF_COPIES = {"checkpoint:before-copy", "checkpoint:after-copy"}
THIS = "tests/chaos/test_kill_points.py"


@dataclass(frozen=True)
class Case:
    action: str
    point: str
    mode: str
    rank: int

    @property
    def fault(self) -> str:
        return f"{self.action}:point={self.point},rank={self.rank},step={STRUCK_STEP}"


CASES = [
    Case(*case)
    for case in itertools.product(("kill", "enospc"), POINTS, ("async", "sync"), (0, 1))
    if case[2] == "async" or case[1] not in OF_COPIES
]


def survive(case: Case, run_dir: Path) -> None:
    """Strike a run in its second save; see that nothing is lost and that it goes on."""
    codes, _ = start(Attempt(run_dir, case.mode, case.fault))
    found = find_checkpoints(run_dir)
    assert found, f"no checkpoint is left, exit codes {codes}"
    problems = {path.name: verify(path) for path in found}
    assert not any(problems.values()), problems
    if case.action == "enospc":
        assert codes == [ENDED, ENDED], codes
    else:
        assert codes[case.rank] == -signal.SIGKILL, "the point was not reached"
        assert codes[1 - case.rank] == FAILED, "the other rank hung, or noticed nothing"
        assert step_of(found[-1]) in (STRUCK_STEP - 1, STRUCK_STEP)
        codes, _ = start(Attempt(run_dir, case.mode))
        assert codes == [ENDED, ENDED], codes
    (last,) = find_checkpoints(run_dir)
    assert step_of(last) == LAST_STEP and verify(last) == []
    left = {item.name for item in last.parent.iterdir()} - {"quarantine"}
    assert left == {last.name, "latest"}, left


def test_the_points_are_many_and_reached_in_both_ways() -> None:
    both = [point for point in POINTS if point not in OF_COPIES]
    assert len(both) >= 12 and len(CASES) == 2 * 2 * (2 * len(both) + len(OF_COPIES))


def test_undisturbed(tmp_path: Path) -> None:
    for mode in ("sync", "async"):
        codes, _ = start(Attempt(tmp_path / mode, mode))
        assert codes == [ENDED, ENDED]
        (last,) = find_checkpoints(tmp_path / mode)
        assert step_of(last) == LAST_STEP


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("action", ["kill", "enospc"])
def test_every_point_is_survived(
    action: str, mode: str, rank: int, size: str, tmp_path: Path
) -> None:
    group = [case for case in CASES if (case.action, case.mode, case.rank) == (action, mode, rank)]
    name = f"{action} {mode} rank {rank}"
    chosen = sampled(group, 2, size, f"kill points {name}")
    lost = {}
    for number, case in enumerate(chosen):
        try:
            survive(case, tmp_path / str(number))
        except AssertionError as error:
            lost[case] = str(error).splitlines()[0]
    assert not lost
    if size == "full":
        figures = {"points": len(chosen), "survived": len(chosen) - len(lost)}
        add_evidence("kill_points", THIS, name, figures)
