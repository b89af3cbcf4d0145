"""One run, many faults, the curve of a run that nobody disturbed; and restarts that never hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kinodit.trainer.resilience.errors import HUNG
from kinodit.trainer.resilience.goodput import Goodput, read_goodput
from kinodit.trainer.resilience.replay import Costs, Interruption, replay, save_interval_s, trace
from tests.support.evidence import write_evidence
from tests.support.lives import End, Lives, Start, describe
from tests.support.ranks import ROOT
from tests.support.sampling import sampled

pytestmark = [pytest.mark.chaos, pytest.mark.gloo, pytest.mark.timeout(10800)]

THIS = "tests/chaos/test_soak.py"
DAYS = 54.0
MEAN_S = DAYS * 86_400 / (419 + 47)
KINDS = [
    "kill:point=step:begin",
    "kill:point=step:micro-batch",
    "kill:point=step:end",
    "raise:point=step:before-update",
    "enospc:point=step:begin",
    "stop:point=step:begin",
    "sleep:point=step:gradients",
    "hang:point=step:before-update",
    "usr1:point=step:begin",
    "term:point=step:gradients",
    "flip:point=step:end",
    "sleep:point=step:begin,seconds=0.5",
    "kill:point=checkpoint:inside-shard",
    "kill:point=checkpoint:after-rename",
    "enospc:point=checkpoint:before-shards",
]
"""A kill before, within and after a step; an error and a full disk in it; a stop signal, a sleep
that is no end of its own and C code that holds the lock; both signals; a flipped bit; a delay;
a kill in the middle of a save and at the end of one, and a disk that is full."""
HANG_S = 2.0
SECTIONS: dict[str, dict[str, object]] = {
    "parallel": {"dp_replicate": 2},
    "data": {"samples_per_step": 12, "packs_per_step": 4},
    "resilience": {"hang_s": HANG_S, "max_fruitless_restarts": 0, "checksum_every_steps": 5},
    "checkpoint": {"every_steps": 10},
}


def curve(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in trained]


def until_finished(lives: Lives, run: Path, start: Start, max_starts: int) -> list[End]:
    """Starts, whatever they end with, until the last step is saved."""
    ends: list[End] = []
    while not (run / "finished").exists():
        assert len(ends) < max_starts, describe(ends[-2:])
        ends.append(lives.run(start))
        assert None not in ends[-1].codes, describe(ends[-1:])
    return ends


@pytest.fixture
def soaked(recipe: Path, size: str) -> tuple[Path, tuple[str, ...]]:
    """What is trained, and how it is changed for that: the demo's recipe in the full size."""
    if size == "ci":
        return recipe, ("run.steps=60", "checkpoint.every_steps=5")
    root = recipe.parent
    demo = ["data", "demo", str(root / "data"), "--num-images", "0", "--num-sounds", "0"]
    demo += ["--num-clips", "800", "--no-real-clips", "--actions", "move"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-m", "kinodit", *demo], env=environment, check=True)
    return ROOT / "configs" / "t2v_tiny.yaml", (
        "run.steps=8000",
        f"run.out_dir={root}",
        f"data.datasets.theatre.path={root / 'data'}",
        "parallel.dp_replicate=2",
        "checkpoint.every_steps=10",
        "sample.every_steps=0",
        "log.every_steps=1",
        f"resilience.hang_s={HANG_S}",
        "resilience.max_fruitless_restarts=0",
        # A flipped bit is found when it would be saved.
        "resilience.checksum_every_steps=10",
    )


def test_thirty_faults_leave_the_curve_alone(
    soaked: tuple[Path, tuple[str, ...]], recipe: Path, lives: Lives, size: str
) -> None:
    trained, base = soaked
    num_faults, steps, every = (30, 8_000, 10) if size == "full" else (6, 60, 5)
    kinds = sampled(KINDS, num_faults, size, "soak")
    root = recipe.parent
    assert lives.run(Start(trained, (*base, "run.name=quiet"), wall_s=6000.0)).codes == [0, 0]
    gap = steps // (num_faults + 1) // every * every
    faults = []
    for index in range(num_faults):
        kind = kinds[index % len(kinds)]
        # Saves are at multiples of `every`; what strikes a step strikes half way between two.
        step = (index + 1) * gap + (0 if "checkpoint:" in kind else every // 2)
        rank = 0 if "after-rename" in kind else index // len(kinds) % 2
        faults.append(f"{kind},rank={rank},step={step},once={root}/fault{index}")
    run = root / "soak"
    start = Start(trained, (*base, "run.name=soak"), ";".join(faults), wall_s=6000.0)
    ends = until_finished(lives, run, start, 3 * num_faults)
    struck = [index for index in range(num_faults) if (root / f"fault{index}").exists()]
    assert struck == list(range(num_faults))
    assert curve(run) == curve(root / "quiet")
    goodput = read_goodput(run)
    assert goodput is not None
    if size == "full":
        keep(goodput, ends, num_faults, steps)
        assert goodput.share_without_startup > 0.9


def keep(goodput: Goodput, ends: list[End], num_faults: int, steps: int) -> None:
    figures = {
        "command": f"pytest -m chaos --size full {THIS}",
        "steps": steps,
        "num_ranks": 2,
        "faults": num_faults,
        "kinds": len(KINDS),
        "starts": len(ends),
        "curve_is_identical": True,
        "goodput": goodput.share,
        "goodput_without_startup": goodput.share_without_startup,
        "seconds": asdict(goodput),
    }
    write_evidence("soak", THIS, figures)


def test_no_restart_after_a_kill_hangs(recipe: Path, lives: Lives, size: str) -> None:
    cycles = 100 if size == "full" else 4
    run = recipe.parent / "cycles"
    faults = ";".join(
        f"kill:rank={cycle % 2},point={('step:begin', 'step:micro-batch', 'step:end')[cycle % 3]},"
        f"step={2 * cycle + 2},once={recipe.parent}/kill{cycle}"
        for cycle in range(cycles)
    )
    overrides = (
        "run.name=cycles",
        f"run.steps={2 * cycles + 4}",
        "checkpoint.every_steps=1",
        "resilience.hang_s=30",
    )
    ends = until_finished(lives, run, Start(recipe, overrides, faults), cycles + 5)
    assert len(ends) == cycles + 1
    assert not [end for end in ends if HUNG in end.codes]
    if size == "full":
        figures = {
            "command": f"pytest -m chaos --size full {THIS}",
            "cycles": cycles,
            "hangs": 0,
            "longest_start_s": max(end.seconds for end in ends),
        }
        write_evidence("restarts", THIS, figures)


def test_a_trace_of_54_days_leaves_97_percent(recipe: Path, size: str) -> None:
    """The interruptions of Llama 3's 54 days (arXiv 2407.21783, section 3.3.4).

    Saved as often as `save_interval_s` says. At costs that are measured here; with a minute until
    every restart, in which the lab has a dead node replaced; and as a large model's state and a
    slow cluster would have it. Beside each how long a restart may take before 97 % are missed.
    """
    costs, measured = measured_costs(recipe)
    interruptions = trace(DAYS, unexpected=419, planned=47, hangs=0.1, seed=0)
    cases = {
        "measured": costs,
        "a minute until each restart": replace(costs, down_s=60.0),
        # Stalls are of a copy on the device's own stream; 60 s to write, 3 min to start.
        "three minutes to start": replace(
            costs, step_s=10.0, save_s=0.05, write_s=60.0, down_s=60.0, startup_s=120.0
        ),
    }
    shares: dict[str, dict[str, Any]] = {}
    for name, cost in cases.items():
        every_steps = max(1, round(save_interval_s(cost, MEAN_S) / cost.step_s))
        share = replay(interruptions, DAYS, cost, every_steps).share
        limit_s = longest_restart_s(interruptions, cost, every_steps)
        shares[name] = {
            "costs": asdict(cost),
            "every_steps": every_steps,
            "goodput": share,
            "longest_restart_s": limit_s,
        }
    if size == "full":
        figures = {"command": f"pytest -m chaos --size full {THIS}", **measured, "replay": shares}
        write_evidence("replay", THIS, figures)
    assert min(case["goodput"] for case in shares.values()) >= 0.97, shares


def longest_restart_s(interruptions: list[Interruption], costs: Costs, every_steps: int) -> float:
    """How long from the end of the ranks to the next step 97 % allow, to the second."""
    low_s, high_s = 0, 2000
    while high_s - low_s > 1:
        middle_s = (low_s + high_s) // 2
        tried = replace(costs, down_s=0.0, startup_s=float(middle_s))
        enough = replay(interruptions, DAYS, tried, every_steps).share >= 0.97
        low_s, high_s = (middle_s, high_s) if enough else (low_s, middle_s)
    return float(low_s)


def measured_costs(recipe: Path) -> tuple[Costs, dict[str, float]]:
    """What a kill and a restart of the command cost on this machine, by the run's own account."""
    run = recipe.parent / "costs"
    command = [sys.executable, "-m", "kinodit", "train", str(recipe), "run.name=costs"]
    command += ["run.steps=60", "parallel.dp_replicate=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    kill = {"KINODIT_FAULTS": f"kill:step=35,once={recipe.parent}/costs.once"}
    for _ in range(2):
        began_s = time.monotonic()
        subprocess.run(command, env={**environment, **kill}, capture_output=True, check=False)
        last_s = time.monotonic() - began_s
    found = read_goodput(run)
    assert found is not None and found.num_starts == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = sorted(row["step_s"] for row in rows)
    figures = {"save_s": found.saves_s / 7, "startup_s": found.startup_s / 2, "start_s": last_s}
    costs = Costs(
        step_s=steps[len(steps) // 2],
        save_s=figures["save_s"],
        write_s=figures["save_s"],
        # resilience.hang_s as it is by default, and what the watchdogs take on top.
        detect_s=121.4,
        down_s=found.down_s,
        startup_s=figures["startup_s"],
    )
    return costs, figures
