"""From any engine to any other, in all pairs: a run goes on as if it had never changed."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kinodit.trainer.config import CONFIG_FILE
from tests.resume.journeys import FLOAT64, assert_as_alone, undisturbed
from tests.resume.test_resume import Start, run_case
from tests.support.ranks import Ranks

FIRST = 3
ENGINES = {
    "native": ("engine.name=native",),
    "megatron": ("engine.name=megatron", "parallel.tp=2"),
    "deepspeed": ("engine.name=deepspeed", "engine.stage=3"),
    "distributed": (
        "engine.name=megatron",
        "engine.data_parallel=distributed_optimizer",
        "engine.bucket_numel=4096",
    ),
}
"""Each on two ranks; megatron's share every matrix, the others hold slices of them, or stretches of
the optimizer's state.
"""
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
    return undisturbed(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def begun(recipe: Path, two: Ranks) -> Callable[[str], Path]:
    """Engine -> the folder of a run that stopped half way."""

    @cache
    def start(engine: str) -> Path:
        chosen = ENGINES[engine]
        two.run(run_case, Start(recipe, engine, FIRST, overrides=(*FLOAT64, *chosen)))
        return recipe.parent / "runs" / engine

    return start


FEW = {("megatron", "deepspeed")}
"""What the default run has time for; `test_engines` goes from native to DeepSpeed and back."""


def _slow_unless(is_quick: bool) -> list[pytest.MarkDecorator]:
    return [] if is_quick else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, id=" to ".join(pair), marks=_slow_unless(pair in FEW)) for pair in PAIRS],
)
def test_the_loss_goes_on(
    first: str, second: str, recipe: Path, two: Ranks, begun: Callable[[str], Path]
) -> None:
    name = f"{first}-{second}"
    folder = recipe.parent / "runs" / name
    shutil.copytree(begun(first), folder)
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace(f"name: {first}\n", f"name: {name}\n", 1))
    two.run(run_case, Start(recipe, name, overrides=(*FLOAT64, *ENGINES[second])))
    assert_as_alone(recipe, name)
