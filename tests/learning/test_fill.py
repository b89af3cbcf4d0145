"""On the demo set a small model fills in more of a clip than a copy of what it is given would.

Every task that is given a part of the video: its first frame, its last, some before, some after,
some between, what is around a hole, what is in it. Clips are held out: other scenes of the same
theatre. What is drawn is a sample, which is farther from the clip than the mean of all that could
have been there; a copy has no such handicap. The ci size has plain backgrounds and eight pictures
that move, trains a third as long, and asks it of three of the tasks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from kinodit.trainer.config import load_config
from tests.support.commands import kinodit
from tests.support.evidence import write_evidence
from tests.support.ranks import ROOT

RECIPE = "tests/learning/fill.yaml"
THEATRE = ["--num-images", "0", "--num-sounds", "0", "--no-real-clips", "--actions", "move"]


@dataclass(frozen=True)
class Size:
    """Clips to train on, steps, clips to draw of each task, and what the theatre shows.

    nearer: tasks that must be nearer than a copy; empty: all
    """

    clips: int
    steps: int
    samples: int
    theatre: tuple[str, ...] = ()
    nearer: tuple[str, ...] = ()


SIZES = {
    "ci": Size(
        300,
        300,
        24,
        ("--backgrounds", "plain", "--num-sprites", "8"),
        ("first_frame", "last_frame", "what_follows"),
    ),
    "full": Size(1200, 1000, 48),
}


@pytest.mark.learning
@pytest.mark.timeout(7200)
def test_each_task_is_nearer_to_the_clip_than_a_copy(size: str, tmp_path: Path) -> None:
    chosen = SIZES[size]
    for name, count, seed in (("train", chosen.clips, 0), ("unseen", chosen.samples, 1)):
        numbers = ["--num-clips", str(count), "--seed", str(seed), "--size", "32"]
        kinodit("data", "demo", str(tmp_path / name), *THEATRE, *chosen.theatre, *numbers)
    recipe = [str(ROOT / RECIPE), f"data.datasets.theatre.path={tmp_path / 'train'}"]
    kinodit("data", "encode", recipe[0], str(tmp_path / "encoded"), *recipe[1:])
    kinodit(
        "train",
        *recipe,
        f"data.datasets.theatre.cache={tmp_path / 'encoded'}",
        f"eval.datasets.theatre.path={tmp_path / 'unseen'}",
        f"run.out_dir={tmp_path}",
        f"run.steps={chosen.steps}",
        f"schedule.decay_steps={chosen.steps * 4 // 5}",
    )
    run = tmp_path / "fill"
    samples = ["--samples", str(chosen.samples), "--losses-only", "--tasks", "all"]
    kinodit("evaluate", str(run), *samples)
    (path,) = run.glob("evaluation/step-*/evaluation.json")
    tasks = json.loads(path.read_text())["tasks"]
    assert set(tasks) == set(load_config(ROOT / RECIPE).tasks)
    found = {name: figures["fill"] for name, figures in tasks.items()}
    for name, fill in found.items():
        print(name, ", ".join(f"{key} {value:.4f}" for key, value in fill.items()))
    for name in chosen.nearer or found:
        assert found[name]["fill_error"] < found[name]["copy_error"], (name, found[name])
    for name, fill in found.items():
        # The codec of the recipe is lossless: what is given is what is shown, to the bit.
        assert fill["kept_error"] == fill["codec_error"] == 0, (name, fill)
    if size == "full":
        command = "pytest -m learning --size full tests/learning/test_fill.py"
        write_evidence("fill", RECIPE, {"command": command, "tasks": found})
