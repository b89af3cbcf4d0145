"""What is drawn after reference pictures is compared with the real picture, and with a copy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kinodit.data.media import write_png
from kinodit.data.pack import pack
from kinodit.launch.cli import main
from kinodit.trainer.evaluation.edit import Edited, compare_edit, edit_figures
from kinodit.trainer.evaluation.table import PICTURES, sample_groups, sample_rows
from tests.support.recipes import tiny_recipe


def plain(level: int, count: int = 1) -> torch.Tensor:
    return torch.full((count, 4, 6, 3), level, dtype=torch.uint8)


def test_the_copy_is_of_the_last_reference() -> None:
    references = torch.cat([plain(0), plain(51)])
    found = compare_edit(plain(153), plain(102), references)
    # 51 levels are a fifth of the scale.
    assert (found.error, found.copy_error) == pytest.approx((0.04, 0.04))
    assert compare_edit(plain(102), plain(102), references).error == 0


def test_figures_are_of_all_samples() -> None:
    assert edit_figures([]) == {}
    figures = edit_figures([Edited(0.01, 0.04), Edited(0.03, 0.02), Edited(0.02, 0.02)])
    assert figures["error"] == pytest.approx(math.sqrt(0.02))
    assert figures["copy_error"] == pytest.approx(math.sqrt(0.08 / 3))
    assert figures["nearer_than_copy"] == pytest.approx(1 / 3)
    rows = sample_rows({"edit": figures})
    assert [(row.label, row.value) for row in rows] == [
        ("error to the real picture (pixels 0 to 1)", "0.141"),
        ("nearer than the copy", "33.3 %"),
    ]
    assert rows[0].beside == (("copy of the last reference", "0.163"),)


def test_pictures_are_a_group_of_their_own() -> None:
    groups = sample_groups({"num_samples": 3, "pictures": {"num_samples": 2}, "tasks": {}})
    assert [(name, count) for name, count, _ in groups] == [("", 3), (PICTURES, 2)]


@pytest.mark.slow
def test_edits_of_a_run_are_measured(tmp_path: Path) -> None:
    (tmp_path / "edits").mkdir()
    for number in range(6):
        write_png(tmp_path / "edits" / f"e{number}.png", plain(40 * number)[0].repeat(4, 3, 1))
        if number < 4:
            before = plain(40 * number + 20)[0].repeat(4, 3, 1)
            write_png(tmp_path / "edits" / f"e{number}.ref0.png", before)
        (tmp_path / "edits" / f"e{number}.txt").write_text("make it darker")
    pack(tmp_path / "edits", tmp_path / "data")
    recipe = tiny_recipe(
        tmp_path,
        tmp_path / "data",
        run={"steps": 1, "out_dir": str(tmp_path / "runs")},
        modalities={"video": {"codec": {"name": "wavelet", "temporal_levels": 0}}},
        data={"num_frames": 1, "fps": 1, "max_references": 1},
        eval={"num_samples": 6, "ema": "main"},
        sample={"sampler": {"steps": 1}, "task": "edit"},
        tasks={"edit": {"streams": {"video": {"references": "clean"}}}, "picture": {}},
    )
    assert main(["train", str(recipe)]) == 0
    assert main(["evaluate", str(tmp_path / "runs" / "tiny"), "--tasks", "all"]) == 0
    (file,) = (tmp_path / "runs" / "tiny" / "evaluation").glob("*/evaluation.json")
    figures = json.loads(file.read_text())
    # From captions alone all are drawn, though the recipe's samples are edits.
    assert figures["num_samples"] == 6 and "pictures" not in figures and "fid" in figures
    edit = figures["tasks"]["edit"]
    assert edit["num_samples"] == 4 and "edit" not in figures["tasks"]["picture"]
    assert edit["edit"]["copy_error"] == pytest.approx(20 / 255) and edit["edit"]["error"] > 0
