"""A ball that bounces and clicks: one checkpoint draws both, the sound of a video, and its video.

Bounces and clicks are read back from pixels and samples of what was drawn for unseen clips: the
median is far less than a frame (1/16 s), and most are within one. Chance is that of bounces and
clicks of different clips.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import kinodit
from tests.support.evidence import write_evidence
from tests.support.ranks import ROOT

RECIPE = "tests/learning/bounce.yaml"
TASKS = ("joint", "sound_of_video", "video_of_sound")
NO_OTHERS = ["--num-clips", "0", "--num-images", "0", "--num-sounds", "0", "--no-real-clips"]


@dataclass(frozen=True)
class Size:
    """Clips to train on, changed keys, clips to draw of each task.

    within_a_frame: the least share of bounces and clicks that are within a frame
    lag_frames:     the greatest median
    """

    clips: int
    changes: tuple[str, ...]
    samples: int
    within_a_frame: float
    lag_frames: float


SIZES = {
    "ci": Size(600, ("run.steps=400", "schedule.decay_steps=160"), 24, 0.5, 1.0),
    "full": Size(2400, (), 48, 0.8, 0.5),
}


def make_clips(folder: Path, count: int, seed: int) -> None:
    kinodit(
        "data", "demo", str(folder), *NO_OTHERS,
        "--num-bounces", str(count), "--size", "32", "--seed", str(seed),
    )  # fmt: skip


@pytest.mark.learning
@pytest.mark.timeout(7200)
def test_clicks_come_when_the_ball_bounces(size: str, tmp_path: Path) -> None:
    chosen = SIZES[size]
    make_clips(tmp_path / "train", chosen.clips, 0)
    make_clips(tmp_path / "unseen", chosen.samples, 1)
    recipe = [
        str(ROOT / RECIPE),
        f"data.datasets.bounces.path={tmp_path / 'train'}",
        f"eval.datasets.bounces.path={tmp_path / 'unseen'}",
        f"run.out_dir={tmp_path}",
    ]
    start_s = time.monotonic()
    kinodit("train", *recipe, *chosen.changes)
    train_s = time.monotonic() - start_s
    run = tmp_path / "bounce"
    kinodit(
        "evaluate", str(run), "--samples", str(chosen.samples), "--losses-only", "--tasks", "all"
    )
    (path,) = run.glob("evaluation/step-*/evaluation.json")
    drawn = json.loads(path.read_text())["tasks"]
    assert sorted(drawn) == sorted(TASKS)
    found = {task: drawn[task]["synchrony"] for task in TASKS}
    print(f"trained in {train_s:.0f} s", json.dumps(found, indent=1))
    for task, figures in found.items():
        assert figures["within_a_frame_real"] > 0.99, "the measure sees what is there"
        assert figures["events"] >= 2 * chosen.samples, (task, "every clip bounces and clicks")
        assert figures["within_a_frame_chance"] < 0.4, (task, figures)
        assert figures["within_a_frame"] > chosen.within_a_frame, (task, figures)
        assert figures["lag_frames"] < chosen.lag_frames, (task, figures)
    if size == "full":
        command = "pytest -m learning --size full tests/learning/test_bounce.py"
        figures = {
            "command": command,
            "clips": chosen.clips,
            "unseen_clips": chosen.samples,
            "train_seconds": round(train_s),
            "tasks": found,
        }
        write_evidence("bounce", RECIPE, figures)
