"""Every tiny recipe trains on a small demo set, and draws something for each of its tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.data.demo.build import DemoOptions, build
from kinodit.launch.cli import main
from kinodit.trainer.config import load_config
from tests.support.ranks import ROOT

RECIPES = sorted((ROOT / "configs").glob("*_tiny.yaml"))
NUM_STEPS = 3
QUICK = ["run.steps=3", "log.every_steps=1", "eval.every_steps=0", "sample.every_steps=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a recipe finds demo/data and demo/edits."""
    folder = tmp_path_factory.mktemp("recipes")
    options = DemoOptions(num_clips=24, num_images=16, num_sounds=16, real_clips=False)
    build(folder / "demo" / "data", options, workers=1)
    edits = DemoOptions(num_clips=0, num_images=0, num_sounds=0, real_clips=False, num_edits=24)
    build(folder / "demo" / "edits", edits, workers=1)
    return folder


@pytest.mark.slow
@pytest.mark.tasks
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_tiny_recipe_trains_and_samples(
    recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["train", str(recipe), *QUICK]) == 0
    run = folder / "runs" / recipe.stem
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == NUM_STEPS and all(0 < loss < 100 for loss in losses)

    config = load_config(recipe)
    prompt = ["--prompt", config.sample.prompts[0], "--steps", "2"]
    assert main(["sample", str(run), *prompt, "--task", ""]) == 0
    index = run / "samples" / "manual" / "index.json"
    (entry,) = json.loads(index.read_text())
    given = index.with_name(str(entry["file"]))
    kept = given.rename(folder / f"{recipe.stem}{given.suffix}")
    for name, task in config.tasks.items():
        wish = ["--task", name, "--given", str(kept)]
        if task.stream("video", False).references == "clean":
            wish += ["--reference", str(kept)] * config.data.max_references
        assert main(["sample", str(run), *prompt, *wish]) == 0, name
        (drawn,) = json.loads(index.read_text())
        assert index.with_name(str(drawn["file"])).stat().st_size > 0
