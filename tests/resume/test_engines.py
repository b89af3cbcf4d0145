"""A run that changes its engine on the way is the run of one process that never did.

In float64 to 1e-12, since ZeRO is told to keep float64 masters there; in float32, where it keeps
float32 ones, within the bound that docs/engines.md states.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.resume.journeys import FLOAT64, Legs, assert_as_alone, travel, undisturbed
from tests.resume.test_resume import Start, final_tensors, metrics, run_case
from tests.support.quick import quick
from tests.support.ranks import Ranks

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"
    ),
]

BOUND = 1e-6
"""Of the losses of ten steps in float32, relative to float64: docs/engines.md."""
LONGER = 10


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("engine.name=deepspeed", f"engine.stage={stage}", *more)


JOURNEYS: dict[str, Legs] = {
    "native-zero1-alone": ((2, ()), (2, zero(1)), (1, ())),
}
LONG: dict[str, Legs] = {
    "zero3x4-fsdp2-tp2-zero3x4": (
        (4, zero(3)),
        (2, ()),
        (2, ("parallel.tp=2",)),
        (4, zero(3, "parallel.tp=2")),
    ),
    "zero3-native-tp2-zero2": (
        (2, zero(3)),
        (2, ("parallel.tp=2",)),
        (2, zero(2, "parallel.tp=2")),
        (2, zero(1, "parallel.cp=2")),
    ),
    "alone-zero2x4": ((1, ()), (4, zero(2)), (2, zero(3))),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize(
    "name", [*JOURNEYS, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
)
def test_engines_take_over_from_each_other(
    name: str, recipe: Path, groups: dict[int, Ranks]
) -> None:
    travel(recipe, name, (JOURNEYS | LONG)[name], groups)
    assert_as_alone(recipe, name)


EXPERTS: dict[str, Legs] = {
    "ep2-zero3-ep2-alone": ((2, ("parallel.ep=2",)), (2, zero(3, "parallel.ep=2")), (1, ())),
    "zero2-megatron-zero1": (
        (2, zero(2)),
        (2, ("engine.name=megatron", "parallel.tp=2")),
        (2, zero(1, "parallel.tp=2")),
        (2, ("parallel.cp=2",)),
    ),
    "ep2-zero3-alone": ((2, ("parallel.ep=2",)), (2, zero(3)), (1, ())),
    "zero2-ep2-fsdp2-zero3-ep2": (
        (4, zero(2, "parallel.ep=2")),
        (2, ()),
        (4, zero(3, "parallel.ep=2", "parallel.tp=2")),
        (4, zero(1, "parallel.ep=2")),
    ),
    "zero1-ep4-ep2-zero2-ep2": (
        (4, zero(1, "parallel.ep=4")),
        (2, ("engine.name=megatron", "parallel.ep=2")),
        (4, zero(2, "parallel.cp=2", "parallel.ep=2")),
        (1, ()),
    ),
}


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pool = {"num_experts": 4, "top_k": 2, "shared_ratio": 0.5, "router": {"balance": "bias"}}
    return undisturbed(tmp_path_factory.mktemp("experts"), model={"experts": {"video": pool}})


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_engines_take_over_experts_and_their_corrections(
    name: str, with_experts: Path, groups: dict[int, Ranks]
) -> None:
    travel(with_experts, name, EXPERTS[name], groups)
    assert_as_alone(with_experts, name)
    tensors = final_tensors(with_experts, name)
    corrections = [x for key, x in tensors.items() if key.endswith(".correction")]
    assert corrections and all(float(np.abs(x).max()) > 0 for x in corrections)


@pytest.mark.parametrize("stage", quick([1, 3]))
def test_float32_masters_stay_within_the_stated_bound(
    stage: int, recipe: Path, groups: dict[int, Ranks]
) -> None:
    # A velocity that is made from a predicted x0 multiplies the forward's own rounding by 1 / t.
    ten = (f"run.steps={LONGER}", "objective.prediction=velocity")
    run_case(0, 1, Start(recipe, "exact", overrides=(*FLOAT64, *ten)))
    groups[2].run(run_case, Start(recipe, f"float32-{stage}", overrides=(*zero(stage), *ten)))
    exact = np.array(metrics(recipe, "exact"))
    found = np.array(metrics(recipe, f"float32-{stage}"))
    assert found.shape == (LONGER, 3)
    worst = np.abs(found[:, 1] / exact[:, 1] - 1).max()
    assert 0 < worst < BOUND
