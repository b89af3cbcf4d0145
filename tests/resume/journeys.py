"""Runs that go on at another layout or engine, against one that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kinodit.trainer import checkpoint
from tests.resume.test_resume import STEPS, Start, final_tensors, metrics, run_case
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

FLOAT64 = tuple(f"precision.{part}=float64" for part in ("params", "compute", "reduce"))
TOLERANCE = 1e-12
Legs = tuple[tuple[int, tuple[str, ...]], ...]
"""What a run goes through: (ranks, overrides), one start after the other."""


def undisturbed(root: Path, **sections: dict[str, object]) -> Path:
    """A recipe in `root`, whose run "alone" has ended, in float64 and in one process."""
    run: dict[str, object] = {"steps": STEPS, "out_dir": str(root / "runs")}
    sections = {"schedule": {"name": "cosine"}, **sections}
    path = tiny_recipe(root, write_dataset(root), run=run, **sections)
    run_case(0, 1, Start(path, "alone", overrides=FLOAT64))
    return path


def travel(recipe: Path, name: str, legs: Legs, groups: dict[int, Ranks]) -> None:
    """One run of `recipe` through all legs, a step each and the rest in the last one."""
    for number, (size, overrides) in enumerate(legs):
        last = number == len(legs) - 1
        start = Start(recipe, name, 0 if last else 1, overrides=(*FLOAT64, *overrides))
        if size == 1:
            run_case(0, 1, start)
        else:
            groups[size].run(run_case, start)


def assert_as_alone(recipe: Path, name: str) -> None:
    """Tensors, position and logged figures of a run are those of "alone"."""
    expected, found = final_tensors(recipe, "alone"), final_tensors(recipe, name)
    assert expected.keys() == found.keys()
    assert {key.split("/")[0] for key in found} == {"model", "optim", "ema"}
    scale = max(float(np.abs(value).max()) for value in expected.values())
    worst = max(float(np.abs(found[key] - expected[key]).max()) for key in expected)
    assert worst / scale < TOLERANCE
    assert _position(recipe, name) == _position(recipe, "alone")
    ours, theirs = np.array(metrics(recipe, name)), np.array(metrics(recipe, "alone"))
    assert ours.shape == theirs.shape == (STEPS, 3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)


def _position(recipe: Path, name: str) -> tuple[int, int, int, int]:
    """Where the data and the schedule stand at the end."""
    (*_, path) = checkpoint.find_checkpoints(recipe.parent / "runs" / name)
    state = checkpoint.load_state(path)
    return state.step, state.data_step, state.num_samples, state.num_tokens
