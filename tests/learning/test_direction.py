"""On the demo set a small model learns what its captions say: which way things move.

`--size full` is the committed recipe to its last step, on two ranks; its figures are kept. The ci
size trains three quarters of it on fewer clips and asks for less.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import kinodit
from tests.support.evidence import write_evidence
from tests.support.ranks import ROOT

RECIPE = "configs/t2v_tiny.yaml"


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, its rows by kind, and how long it took."""

    folder: Path
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    train_s: float
    size: str


@pytest.fixture(scope="module")
def trained(size: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("direction")
    clips = "2000" if size == "full" else "800"
    demo = ["--num-clips", clips, "--num-images", "0", "--num-sounds", "0", "--no-real-clips"]
    actions = [] if size == "full" else ["--actions", "move"]
    kinodit("data", "demo", str(root / "data"), *demo, *actions)
    steps = [] if size == "full" else ["run.steps=1500", "schedule.decay_steps=450"]
    start_s = time.monotonic()
    kinodit(
        "train",
        str(ROOT / RECIPE),
        f"run.out_dir={root}",
        "run.name=run",
        f"data.datasets.theatre.path={root / 'data'}",
        "sample.every_steps=0",
        *steps,
        ranks=2,
    )
    train_s = time.monotonic() - start_s
    rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    by_kind = {
        kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "validation")
    }
    return Trained(root / "run", by_kind["train"], by_kind["validation"], train_s, size)


@pytest.mark.learning
@pytest.mark.timeout(7200)
def test_loss_falls_and_captions_matter(trained: Trained) -> None:
    first, last = trained.train[0], trained.train[-1]
    assert last["loss"] < 0.6 * first["loss"]
    final = trained.validation[-1]
    margin = final["loss_shuffled_captions/video"] - final["loss/video"]
    print(
        f"validation loss {final['loss/video']:.4f} with true captions, "
        f"{final['loss_shuffled_captions/video']:.4f} with others' ({margin:+.4f})"
    )
    assert margin > 0.2 * final["loss/video"]


@pytest.mark.learning
@pytest.mark.timeout(7200)
def test_clips_move_as_their_prompt_says(trained: Trained) -> None:
    clips = "256" if trained.size == "full" else "128"
    kinodit("measure", str(trained.folder), "--clips", clips, ranks=2)
    motion = json.loads((trained.folder / "motion.json").read_text())
    print(f"{motion['num_right']} of {motion['num_clips']} clips move as their prompt says")
    assert motion["accuracy"] >= (0.8 if trained.size == "full" else 0.5)
    if trained.size == "ci":
        return
    final = trained.validation[-1]
    write_evidence(
        "direction",
        RECIPE,
        {
            "command": "pytest -m learning --size full tests/learning/test_direction.py",
            "num_ranks": 2,
            "steps": trained.train[-1]["step"],
            "train_seconds": round(trained.train_s),
            "first_loss": trained.train[0]["loss"],
            "last_loss": trained.train[-1]["loss"],
            "validation_loss": final["loss/video"],
            "validation_loss_shuffled_captions": final["loss_shuffled_captions/video"],
            **motion,
        },
    )
