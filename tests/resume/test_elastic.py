"""A run that goes on at other numbers of ranks, split otherwise, is the run of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kinodit.trainer import checkpoint
from tests.resume.test_resume import STEPS, Start, final_tensors, metrics, run_case
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

pytestmark = pytest.mark.gloo

FLOAT64 = tuple(f"precision.{part}=float64" for part in ("params", "compute", "reduce"))
TOLERANCE = 1e-12
# What a run goes through: (ranks, overrides), one start after the other.
JOURNEYS = {
    "4-2-3-1": ((4, ()), (2, ()), (3, ()), (1, ())),
    "tp2-tp1": ((2, ("parallel.tp=2",)), (2, ())),
    "tp2-alone": ((2, ("parallel.tp=2",)), (1, ())),
    "cp1-cp2": ((2, ()), (2, ("parallel.cp=2",))),
    "alone-cp2-alone": ((1, ()), (2, ("parallel.cp=2",)), (1, ())),
    "shard-replicate": ((2, ()), (2, ("parallel.dp_replicate=2",))),
    "tp2-cp2": ((2, ("parallel.tp=2",)), (2, ("parallel.cp=2", "parallel.ring=2"))),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    run: dict[str, object] = {"steps": STEPS, "out_dir": str(root / "runs")}
    path = tiny_recipe(root, write_dataset(root), run=run, schedule={"name": "cosine"})
    run_case(0, 1, Start(path, "alone", overrides=FLOAT64))
    return path


@pytest.mark.parametrize("name", JOURNEYS)
def test_every_leg_goes_on_exactly(name: str, recipe: Path, groups: dict[int, Ranks]) -> None:
    legs = JOURNEYS[name]
    for number, (size, overrides) in enumerate(legs):
        last = number == len(legs) - 1
        start = Start(recipe, name, 0 if last else 1, overrides=(*FLOAT64, *overrides))
        if size == 1:
            run_case(0, 1, start)
        else:
            groups[size].run(run_case, start)
    expected, found = final_tensors(recipe, "alone"), final_tensors(recipe, name)
    assert expected.keys() == found.keys()
    assert {key.split("/")[0] for key in found} == {"model", "optim", "ema"}
    scale = max(float(np.abs(value).max()) for value in expected.values())
    worst = max(float(np.abs(found[key] - expected[key]).max()) for key in expected)
    assert worst / scale < TOLERANCE
    assert position(recipe, name) == position(recipe, "alone")
    ours, theirs = np.array(metrics(recipe, name)), np.array(metrics(recipe, "alone"))
    assert ours.shape == theirs.shape == (STEPS, 3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)


def position(recipe: Path, name: str) -> tuple[int, int, int, int]:
    """Where the data and the schedule stand at the end."""
    (*_, path) = checkpoint.find_checkpoints(recipe.parent / "runs" / name)
    state = checkpoint.load_state(path)
    return state.step, state.data_step, state.num_samples, state.num_tokens
