"""Clips of any size and length, in as many packs as they need: one curve whatever the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kinodit.data.media import write_mp4
from kinodit.data.pack import pack
from tests.resume.journeys import FLOAT64, Legs, assert_as_alone, travel
from tests.resume.test_resume import STEPS, Start, run_case
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_clips

pytestmark = pytest.mark.gloo

LEGS: Legs = ((2, ()), (3, ()), (2, ("parallel.dp_replicate=2",)), (1, ()))
SOURCES = ((24, 48, 32), (10, 32, 64), (30, 24, 24), (16, 16, 64), (12, 32, 40))


@pytest.fixture(scope="module", params=quick(["budget", "class"]))
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    write_clips(root / "clips", 7)
    for number, (frames, height, width) in enumerate(SOURCES):
        video = np.full((frames, height, width, 3), 60 + 30 * number, np.uint8)
        write_mp4(root / "clips" / f"own{number}.mp4", video, fps=8)
        (root / "clips" / f"own{number}.txt").write_text(f"a thing of {number}")
    pack(root / "clips", root / "data")
    data: dict[str, object] = {
        "datasets": {"clips": {"path": str(root / "data")}}, "num_frames": 16, "fps": 8,
        "height": 16, "width": 16, "samples_per_step": 8, "packs_per_step": 3, "num_threads": 1,
        "sizes": "own", "packing": request.param, "token_budget": 400, "window_steps": 2,
    }  # fmt: skip
    run: dict[str, object] = {"steps": STEPS, "out_dir": str(root / "runs")}
    path = tiny_recipe(root, root / "data", run=run, schedule={"name": "cosine"}, data=data)
    run_case(0, 1, Start(path, "alone", overrides=FLOAT64))
    return path


def test_ranks_and_restarts_leave_the_curve(recipe: Path, groups: dict[int, Ranks]) -> None:
    travel(recipe, "travelled", LEGS, groups)
    assert_as_alone(recipe, "travelled")
