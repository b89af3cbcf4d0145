"""Bad steps on some rank of a real run: skipped by all, gone back from, never saved."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint import FileSystemReader

from kinodit.trainer import checkpoint, faults
from kinodit.trainer.certify.ranks import RankError
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.run import train
from kinodit.trainer.topology import Topology
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.chaos, pytest.mark.gloo]

STEPS = 10
SECTIONS: dict[str, dict[str, object]] = {"run": {"steps": STEPS}}
GUARD = ("checkpoint.keep_last=0", "resilience.guard.window_steps=4")


@dataclass(frozen=True)
class Struck:
    """One start of a run, and what strikes it."""

    recipe: Path
    name: str
    faults: str = ""
    overrides: tuple[str, ...] = ()


def run_case(rank: int, world_size: int, struck: Struck) -> tuple[int, int]:
    """(step, step of the data plan) that the run ended at."""
    config = load_config(struck.recipe, [f"run.name={struck.name}", *GUARD, *struck.overrides])
    faults.arm(faults.parse_faults(struck.faults), rank)
    try:
        state = train(config, Topology(rank, world_size, rank), torch.device("cpu"), io.StringIO())
    finally:
        faults.disarm()
    return state.step, state.data_step


def tensors_of(recipe: Path, name: str, step: int) -> dict[str, NDArray[Any]]:
    path = recipe.parent / name / "checkpoints" / f"step-{step:08d}"
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in metadata.items()
    }
    checkpoint.load(path, tensors, Mesh(torch.device("cpu")))
    return {key: value.numpy() for key, value in tensors.items()}


def assert_same(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [key for key in theirs if not np.array_equal(ours[key], theirs[key])]


def rows(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def curve(run: Path) -> list[tuple[int, Any, Any]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)]


@pytest.mark.parametrize("action", ["nan", "spike"])
@pytest.mark.parametrize("dp_replicate", [1, 2])
def test_a_bad_step_of_one_rank_leaves_all_as_they_were(
    action: str, dp_replicate: int, recipe: Path, two: Ranks
) -> None:
    name = f"skip-{action}{dp_replicate}"
    every = ("checkpoint.every_steps=1", f"parallel.dp_replicate={dp_replicate}")
    fault = f"{action}:point=step:gradients,rank=1,step=6,scale=1e9"
    assert two.run(run_case, Struck(recipe, name, fault, every)) == [(STEPS, STEPS)] * 2
    assert_same(tensors_of(recipe, name, 7), tensors_of(recipe, name, 6))
    before, after = tensors_of(recipe, name, 5), tensors_of(recipe, name, 8)
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert len(changed) > 0.9 * len(before)
    run = recipe.parent / name
    events = [row for row in rows(run, "events.jsonl") if row["event"] == "skip"]
    assert len(events) == 1
    assert "the gradient norm is" in events[0]["message"]
    skipped = {row["step"]: row["skipped_steps"] for row in rows(run)}
    assert skipped == {step: int(step == 7) for step in range(1, STEPS + 1)}


def test_goes_back_past_the_data_and_any_restart_takes_the_same_way(
    recipe: Path, two: Ranks
) -> None:
    fault = ";".join(f"nan:point=step:gradients,rank=0,step={step}" for step in (4, 5, 6))
    every = ("checkpoint.every_steps=2",)
    assert two.run(run_case, Struck(recipe, "back", fault, every)) == [(STEPS, STEPS + 3)] * 2
    run = recipe.parent / "back"
    assert [row["event"] for row in rows(run, "events.jsonl")].count("rollback") == 1
    (entry,) = rows(run, "rollbacks.jsonl")
    assert (entry["to_step"], entry["data_offset"]) == (4, 3)
    assert [step for step, *_ in curve(run)] == list(range(1, STEPS + 1))
    # A run that is killed right after it went back, before anything else is saved.
    killed = recipe.parent / "killed"
    shutil.copytree(run, killed)
    (killed / "finished").unlink()
    config = killed / "config.yaml"
    config.write_text(config.read_text().replace("name: back", "name: killed"))
    for path in checkpoint.find_checkpoints(killed):
        if checkpoint.step_of(path) > 4:
            shutil.rmtree(path)
    assert two.run(run_case, Struck(recipe, "killed", "", every)) == [(STEPS, STEPS + 3)] * 2
    assert_same(tensors_of(recipe, "killed", STEPS), tensors_of(recipe, "back", STEPS))
    assert curve(killed) == curve(run)


def test_starts_anew_where_nothing_was_saved_yet(recipe: Path, two: Ranks) -> None:
    fault = ";".join(f"nan:point=step:gradients,step={step}" for step in (1, 2, 3))
    assert two.run(run_case, Struck(recipe, "anew", fault)) == [(STEPS, STEPS + 4)] * 2
    assert [step for step, *_ in curve(recipe.parent / "anew")] == list(range(1, STEPS + 1))


def test_poisoned_parameters_are_never_saved(recipe: Path, two: Ranks) -> None:
    # A weight goes bad after the update of step 5, just before the save of step 6.
    fault = "nan:point=step:end,rank=1,step=5"
    every = ("checkpoint.every_steps=2",)
    assert two.run(run_case, Struck(recipe, "poison", fault, every)) == [(STEPS, STEPS + 2)] * 2
    for path in checkpoint.find_checkpoints(recipe.parent / "poison"):
        tensors = tensors_of(recipe, "poison", checkpoint.step_of(path))
        assert all(np.isfinite(value).all() for value in tensors.values())


def test_gives_up_where_going_back_does_not_help(recipe: Path) -> None:
    group = Ranks(2)
    fault = "nan:point=step:gradients,times=1000"
    limits = ("resilience.guard.max_skips=2", "resilience.guard.max_rollbacks=1")
    with pytest.raises(RankError, match="went back to step 0 1 times already"):
        group.run(run_case, Struck(recipe, "hopeless", fault, limits))
    assert not checkpoint.find_checkpoints(recipe.parent / "hopeless")
