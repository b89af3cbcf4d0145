"""Still images beside clips are drawn and measured as such; a cache leaves figures as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kinodit.data.media import write_png
from kinodit.data.pack import pack
from kinodit.launch.cli import main
from kinodit.trainer.evaluation.table import PICTURES
from tests.support.recipes import tiny_recipe, write_clips


@pytest.mark.slow
def test_pictures_have_figures_of_their_own_and_a_cache_changes_none(tmp_path: Path) -> None:
    from kinodit.launch.report.read import read_run

    write_clips(tmp_path / "clips", 5)
    for number in range(5):
        picture = torch.full((32, 32, 3), 40 * number, dtype=torch.uint8)
        write_png(tmp_path / "clips" / f"still{number}.png", picture)
        (tmp_path / "clips" / f"still{number}.txt").write_text("a plain picture")
    pack(tmp_path / "clips", tmp_path / "data")
    recipe = tiny_recipe(
        tmp_path,
        tmp_path / "data",
        run={"steps": 1, "out_dir": str(tmp_path / "runs")},
        modalities={
            "video": {
                "codec": {"name": "wavelet", "temporal_levels": 1, "first_frame_alone": True},
                "patch": [1, 2, 2],
            }
        },
        data={"num_frames": 5},
        eval={"num_samples": 10, "ema": "main"},
        sample={"sampler": {"steps": 1}},
    )
    assert main(["data", "encode", str(recipe), str(tmp_path / "cache")]) == 0
    found = []
    for name, cache in (("plain", ""), ("cached", str(tmp_path / "cache"))):
        keys = [f"run.name={name}", *([f"data.datasets.clips.cache={cache}"] if cache else [])]
        assert main(["train", str(recipe), *keys]) == 0
        assert main(["evaluate", str(tmp_path / "runs" / name)]) == 0
        (file,) = (tmp_path / "runs" / name / "evaluation").glob("*/evaluation.json")
        found.append(json.loads(file.read_text()))
        folder = file.parent
    plain, cached = found
    assert plain == cached
    assert plain["num_samples"] + plain["pictures"]["num_samples"] == 10
    assert plain["pictures"]["num_samples"] >= 4
    assert {"fid", "fvd"} <= plain.keys() and "fid" in plain["pictures"]
    assert "fvd" not in plain["pictures"]
    pictures = sorted((folder / "pictures").glob("0*.png"))
    assert len(pictures) == plain["pictures"]["num_samples"]
    shown = read_run(tmp_path / "runs" / "cached").evaluated
    assert len(shown[PICTURES]) == min(6, len(pictures))
    assert all(file.path.suffix == ".png" for file in shown[PICTURES])
