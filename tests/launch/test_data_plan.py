"""`kinodit data plan` shows a recipe's data order, and names what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.launch.cli import main
from tests.support.recipes import tiny_recipe, write_dataset


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    return tiny_recipe(root, write_dataset(root))


def test_a_recipe_is_described(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["data.packing=budget", "data.token_budget=400", "data.sizes=own", "data.height=24"]
    assert main(["data", "plan", str(recipe), *budget, "--ranks", "3", "--steps", "4"]) == 0
    said = capsys.readouterr().out
    for text in (
        "clips: 12 of 12 samples, 100 % of a step; an epoch is 2.0 steps, the run 3.00 epochs",
        "4 x 16 x 16",
        "tokens of a sample",
        "of the first 4 steps",
        "of 400 tokens used",
        "balance on 3 ranks",
        "from 1.0 shards a step",
    ):
        assert text in said, said
    assert max(map(len, said.splitlines())) < 160


def test_json_has_the_same(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", str(recipe), "--json", "--steps", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_ranks"] == 3 and document["steps"]["num_steps"] == 2
    assert document["steps"]["samples"] == [6, 6.0, 6] and document["steps"]["waiting"] == 1.0
    assert document["classes"][0]["samples"] == 1.0


def test_what_cannot_be_planned_is_an_error(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.packing=budget", "data.token_budget=20"]
    assert main(["data", "plan", str(recipe), *small]) == 2
    assert "data.token_budget is 20, but 12 of the 12 samples" in capsys.readouterr().err
    assert main(["data", "plan", str(recipe), "data.datasets.clips.filter=height > 99"]) == 2
    assert "no sample of 12 can be used" in capsys.readouterr().err
    assert main(["data", "plan", str(recipe), "data.datasets.clips.max_epochs=2"]) == 2
    assert "gone through 3.00 times in 6 steps" in capsys.readouterr().err
