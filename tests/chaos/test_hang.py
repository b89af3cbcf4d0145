"""A rank that hangs is found, named and ended, and so are those that wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kinodit.trainer.resilience.errors import HUNG
from kinodit.trainer.resilience.watchdog import read_reports
from tests.support.evidence import write_evidence
from tests.support.lives import Lives, Start
from tests.support.ranks import ROOT
from tests.support.sampling import sampled

pytestmark = [pytest.mark.chaos, pytest.mark.gloo, pytest.mark.timeout(3600)]

THIS = "tests/chaos/test_hang.py"
STEPS = 8
HANG_S = 5.0
LATE_S = 2.0
SECTIONS: dict[str, dict[str, object]] = {
    "run": {"steps": STEPS},
    "resilience": {"hang_s": HANG_S},
    "checkpoint": {"every_steps": 2},
}
HANGS = [
    f"{action}:point={point},rank={rank},step=4,once=ONCE"
    for action in ("stop", "sleep", "hang")
    for point in ("step:begin", "step:gradients", "step:before-update")
    for rank in (0, 1)
]
"""A stop signal, a sleep while the others are in a collective, and C code that holds the lock."""


def test_a_hung_rank_is_found_in_time_with_the_stacks_of_all(
    recipe: Path, lives: Lives, size: str
) -> None:
    found = []
    for number, hang in enumerate(sampled(HANGS, 3, size, "hangs")):
        name = f"hang{number}"
        run = recipe.parent / name
        fault = hang.replace("ONCE", str(recipe.parent / f"{name}.once"))
        start = Start(recipe, (f"run.name={name}",), fault)
        end = lives.run(start)
        assert end.codes == [HUNG, HUNG], (hang, end.logs)
        folder = run / "stacks" / "start-0001"
        reports = read_reports(folder)
        assert [report.rank for report in reports] == [0, 1], (hang, end.logs)
        odd = int(hang.split("rank=")[1][0])
        # What the one who hangs was silent for when its watchdog said so.
        # The limit is above HANG_S only where the machine was so busy that a step took a second.
        assert HANG_S <= reports[odd].limit_s < 3 * HANG_S
        assert reports[odd].silent_s < reports[odd].limit_s + LATE_S, hang
        assert (reports[odd].step, reports[odd].stopped) == (4, hang.startswith("stop"))
        summary = (folder / "summary.txt").read_text()
        assert summary.startswith(f"rank {odd} of 2 "), (hang, summary)
        assert "in step 4" in summary
        assert "(control)" in summary or "(fsdp" in summary
        for rank in (0, 1):
            stacks = (folder / f"rank-{rank:05d}.txt").read_text()
            assert "trainer/step.py" in stacks or "trainer/loop.py" in stacks, (hang, stacks)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert events[-1]["event"] == "hang"
        assert events[-1]["message"].startswith(f"rank {odd} of 2")
        # What follows is a restart as any other.
        assert lives.run(start).codes == [0, 0]
        found.append((hang.split(",once=")[0], reports[odd].silent_s - reports[odd].limit_s))
    if size == "full":
        figures = {
            "command": f"pytest -m chaos --size full {THIS}",
            "hang_s": HANG_S,
            "found_s_after_the_limit": dict(found),
            "found_in_time_with_all_stacks": len(found),
        }
        write_evidence("hangs", THIS, figures)


def test_slow_steps_are_no_hang(recipe: Path, lives: Lives) -> None:
    # Longer than hang_s, but not than five times the longest step so far.
    took_s = {1: 0.6, 2: 1.5, 3: 1.5, 5: 1.5}
    slow = ";".join(f"sleep:seconds={s},rank=1,step={step}" for step, s in took_s.items())
    overrides = ("run.name=slow", "resilience.hang_s=1")
    end = lives.run(Start(recipe, overrides, slow))
    assert end.codes == [0, 0], end.logs


def test_a_killed_rank_is_named_and_its_step(recipe: Path, lives: Lives) -> None:
    end = lives.run(Start(recipe, ("run.name=killed",), "kill:rank=1,step=4"))
    assert end.codes[1] == 128 + signal.SIGKILL
    assert end.codes[0] != 0
    assert "rank 1 was ended by SIGKILL in step 4" in end.logs[1]


def test_the_command_watches_itself_and_passes_signals_on(recipe: Path) -> None:
    """The command as people start it: its child does the work, and dies with it."""
    run = recipe.parent / "command"
    command = [sys.executable, "-m", "kinodit", "train", str(recipe)]
    overrides = ["run.name=command", "run.steps=100000", "checkpoint.every_steps=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen(
        [*command, *overrides], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        metrics = run / "metrics.jsonl"
        deadline_s = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and parent.poll() is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        (child,) = children.read_text().split()
        parent.send_signal(signal.SIGUSR1)
        _, said = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert parent.returncode == 0, said
    assert (run / "requeue.local").exists()
    modes = {path: path.stat().st_mode & 0o027 for path in [run, *run.rglob("*")]}
    assert len(modes) > 5 and not any(modes.values()), modes
    assert not Path(f"/proc/{child}").exists()
