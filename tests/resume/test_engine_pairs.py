"""From any engine to any other, in all nine pairs: a run goes on as if it had never changed."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from kinodit.trainer.config import CONFIG_FILE
from tests.resume.test_elastic import FLOAT64, TOLERANCE
from tests.resume.test_resume import STEPS, Start, final_tensors, metrics, run_case
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

FIRST = 3
ENGINES = {
    "native": ("engine.name=native",),
    "megatron": ("engine.name=megatron", "parallel.tp=2"),
    "deepspeed": ("engine.name=deepspeed", "engine.stage=3"),
}
"""Each on two ranks; megatron's share every matrix, the others hold slices of them."""
PAIRS = list(itertools.product(ENGINES, ENGINES))
pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("deepspeed", "megatron")),
        reason="needs the extras deepspeed and megatron",
    ),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    run: dict[str, object] = {"steps": STEPS, "out_dir": str(root / "runs")}
    path = tiny_recipe(root, write_dataset(root), run=run, schedule={"name": "cosine"})
    run_case(0, 1, Start(path, "alone", overrides=FLOAT64))
    return path


@pytest.fixture(scope="module")
def begun(recipe: Path, two: Ranks) -> dict[str, Path]:
    """Engine -> the folder of a run that stopped half way."""
    for engine, chosen in ENGINES.items():
        two.run(run_case, Start(recipe, engine, FIRST, overrides=(*FLOAT64, *chosen)))
    return {engine: recipe.parent / "runs" / engine for engine in ENGINES}


FEW = {("native", "deepspeed"), ("deepspeed", "megatron"), ("megatron", "native")}
"""Each engine once before and once after the change: what the default run has time for."""


def _slow_unless(is_quick: bool) -> list[pytest.MarkDecorator]:
    return [] if is_quick else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, id=" to ".join(pair), marks=_slow_unless(pair in FEW)) for pair in PAIRS],
)
def test_the_loss_goes_on(
    first: str, second: str, recipe: Path, two: Ranks, begun: dict[str, Path]
) -> None:
    name = f"{first}-{second}"
    folder = recipe.parent / "runs" / name
    shutil.copytree(begun[first], folder)
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace(f"name: {first}\n", f"name: {name}\n", 1))
    two.run(run_case, Start(recipe, name, overrides=(*FLOAT64, *ENGINES[second])))
    ours, theirs = np.array(metrics(recipe, name)), np.array(metrics(recipe, "alone"))
    assert ours.shape == theirs.shape == (STEPS, 3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)
    expected, found = final_tensors(recipe, "alone"), final_tensors(recipe, name)
    assert expected.keys() == found.keys()
    scale = max(float(np.abs(value).max()) for value in expected.values())
    assert max(float(np.abs(found[key] - expected[key]).max()) for key in expected) < (
        TOLERANCE * scale
    )
