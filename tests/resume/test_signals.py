"""A run that is told to stop saves at the next step, on all ranks, and goes on as if it had not."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kinodit.trainer import checkpoint
from kinodit.trainer.config import load_config
from kinodit.trainer.resilience.guard import Guard
from kinodit.trainer.resilience.signals import FINISHED_FILE, Signals
from kinodit.trainer.run import train
from kinodit.trainer.state import TrainState
from kinodit.trainer.step import Gate
from kinodit.trainer.topology import Job, Topology
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

STEPS = 5
JOB = Job("77")


@dataclass(frozen=True)
class Told:
    """signals: (rank, in which step, signal); during: signals that arrive in the save."""

    recipe: Path
    name: str
    signals: tuple[tuple[int, int, int], ...] = ()
    during: tuple[int, ...] = ()
    job: Job = JOB
    overrides: tuple[str, ...] = ()


def run_case(rank: int, world_size: int, told: Told) -> int:
    """The step the run ended at."""
    patch = pytest.MonkeyPatch()
    gate, save = Guard.gate, checkpoint.Saver.save

    def interrupted_gate(self: Guard, step: int) -> Gate:
        for target, struck, number in told.signals:
            if (target, struck) == (rank, step + 1):
                os.kill(os.getpid(), number)
        return gate(self, step)

    def interrupted_save(
        self: checkpoint.Saver, state: TrainState, tensors: Mapping[str, Tensor]
    ) -> list[checkpoint.Outcome]:
        for number in told.during:
            os.kill(os.getpid(), number)
        return save(self, state, tensors)

    patch.setattr(Guard, "gate", interrupted_gate)
    patch.setattr(checkpoint.Saver, "save", interrupted_save)
    config = load_config(told.recipe, [f"run.name={told.name}", *told.overrides])
    topology = Topology(rank, world_size, rank, told.job)
    try:
        with Signals() as signals:
            state: TrainState = train(config, topology, torch.device("cpu"), io.StringIO(), signals)
    finally:
        patch.undo()
    return state.step


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signals")
    return tiny_recipe(root, write_dataset(root), run={"steps": STEPS, "out_dir": str(root)})


def rows(recipe: Path, name: str) -> list[tuple[int, float, float]]:
    lines = (recipe.parent / name / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def saved_steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.find_checkpoints(run)]


def events(run: Path) -> list[str]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["message"] for line in lines]


@pytest.mark.gloo
def test_usr1_on_one_rank_saves_on_all_and_asks_for_another_turn(recipe: Path, two: Ranks) -> None:
    run = recipe.parent / "usr1"
    told = Told(recipe, "usr1", ((1, 2, signal.SIGUSR1),), during=(signal.SIGTERM, signal.SIGUSR1))
    assert two.run(run_case, told) == [2, 2]
    assert saved_steps(run) == [2]
    assert json.loads((run / "requeue.77").read_text()) == {"step": 2}
    assert not (run / FINISHED_FILE).exists()
    assert any("come back" in message for message in events(run))
    # The next turn takes the marker away, so that a crash in it is not taken for a wish.
    assert two.run(run_case, Told(recipe, "usr1")) == [STEPS, STEPS]
    assert not (run / "requeue.77").exists()
    two.run(run_case, Told(recipe, "whole"))
    assert rows(recipe, "usr1") == rows(recipe, "whole")


@pytest.mark.gloo
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
def test_term_saves_and_is_never_requeued(first: int, recipe: Path, two: Ranks) -> None:
    name = f"term{first}"
    run = recipe.parent / name
    # One rank hears USR1, the other TERM, in the same step: who said stop is not requeued.
    signals = ((0, 3, first), (1, 3, signal.SIGTERM))
    assert two.run(run_case, Told(recipe, name, signals)) == [3, 3]
    assert saved_steps(run) == [3]
    assert not list(run.glob("requeue.*"))


@pytest.mark.gloo
def test_a_finished_run_ends_at_once(recipe: Path, two: Ranks) -> None:
    run = recipe.parent / "finished"
    assert two.run(run_case, Told(recipe, "finished")) == [STEPS, STEPS]
    assert json.loads((run / FINISHED_FILE).read_text()) == {"step": STEPS}
    before = (run / "events.jsonl").read_bytes()
    assert two.run(run_case, Told(recipe, "finished")) == [STEPS, STEPS]
    assert (run / "events.jsonl").read_bytes() == before


def test_the_last_step_finishes_the_run_although_it_was_told_to_stop(recipe: Path) -> None:
    told = Told(recipe, "last", ((0, STEPS, signal.SIGUSR1),))
    assert run_case(0, 1, told) == STEPS
    run = recipe.parent / "last"
    assert (run / FINISHED_FILE).exists()
    assert not list(run.glob("requeue.*"))


def test_saves_before_the_end_of_the_job_without_a_signal(recipe: Path) -> None:
    run = recipe.parent / "limit"
    ended = Job("78", ends_at_s=0.0)
    assert run_case(0, 1, Told(recipe, "limit", job=ended)) == 1
    assert (run / "requeue.78").exists()
    off = ("resilience.save_margin_s=0",)
    assert run_case(0, 1, Told(recipe, "limit", job=ended, overrides=off)) == STEPS


def test_what_was_due_when_it_was_told_to_stop_is_not_lost(recipe: Path) -> None:
    """A validation in the very step, and the losses since the last row."""
    extra = ("eval.every_steps=2", "eval.num_samples=5", "log.every_steps=3")
    run_case(0, 1, Told(recipe, "due-whole", overrides=extra))
    told = Told(recipe, "due", ((0, 2, signal.SIGUSR1),), overrides=extra)
    assert run_case(0, 1, told) == 2
    assert run_case(0, 1, Told(recipe, "due", overrides=extra)) == STEPS
    found = {name: kinds(recipe.parent / name) for name in ("due", "due-whole")}
    assert found["due-whole"] == [
        ("validation", 2),
        ("train", 3),
        ("validation", 4),
        ("train", 5),
        ("validation", 5),
    ]
    assert found["due"] == [("train", 2), *found["due-whole"]]


def kinds(run: Path) -> list[tuple[str, int]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["kind"], row["step"]) for row in map(json.loads, lines)]
