"""Every choice of optimizer goes on from a checkpoint: bit for bit, and on other ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.resume.test_resume import Start, assert_equal_bits, final_tensors, metrics, run_case
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

STEPS = 6
CHOICES = ("muon", "adamw8bit")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimizers")
    return tiny_recipe(
        root,
        write_dataset(root),
        run={"steps": STEPS, "out_dir": str(root / "runs")},
        # The feed-forward's second matrix has rows of 256.
        model={"preset": "tiny", "width": 64, "num_heads": 2, "num_double_blocks": 1},
    )


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(CHOICES))
def test_interrupted_is_uninterrupted_on_one_and_two_ranks(
    name: str, recipe: Path, two: Ranks
) -> None:
    chosen = (f"optim.name={name}",)
    run_case(0, 1, Start(recipe, f"{name}-whole", overrides=chosen))
    for stop_after in (3, 0):
        run_case(0, 1, Start(recipe, f"{name}-cut", stop_after, overrides=chosen))
    expected = final_tensors(recipe, f"{name}-whole")
    assert_equal_bits(final_tensors(recipe, f"{name}-cut"), expected)
    assert metrics(recipe, f"{name}-cut") == metrics(recipe, f"{name}-whole")
    kept = {key.split("/")[1] for key in expected if key.startswith("optim/")}
    assert {"muon": "momentum", "adamw8bit": "exp_avg_codes"}[name] in kept

    two.run(run_case, Start(recipe, f"{name}-two", overrides=chosen))
    for stop_after in (2, 0):
        two.run(run_case, Start(recipe, f"{name}-two-cut", stop_after, overrides=chosen))
    assert_equal_bits(
        final_tensors(recipe, f"{name}-two-cut"), final_tensors(recipe, f"{name}-two")
    )
    # From two ranks to one: the state is that of the parameters, wherever they lie.
    two.run(run_case, Start(recipe, f"{name}-moved", 3, overrides=chosen))
    run_case(0, 1, Start(recipe, f"{name}-moved", overrides=chosen))
    losses = [np.array(metrics(recipe, f"{name}-{end}")) for end in ("moved", "whole")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
