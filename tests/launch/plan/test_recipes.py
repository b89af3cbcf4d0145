"""Recipes with sound, and the large ones: what they hold, and that the planner takes them."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from kinodit.launch.cli import main
from kinodit.launch.commands import plan
from kinodit.launch.plan.estimate import Estimator
from kinodit.launch.plan.search import judge
from kinodit.launch.plan.workload import Given, read_workload
from kinodit.models.flops import count_active_parameters, count_parameters
from kinodit.trainer.config import load_config
from tests.support.ranks import ROOT

LARGE = {"t2v_8b": (8, 8, 64), "av_14b": (14, 14, 128), "av_moe_30b": (30, 6, 256)}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_is_as_large_as_its_name_says(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    billions, active, _ = LARGE[name]
    workload = read_workload(config, Given())
    assert count_parameters(workload.model) / 1e9 == pytest.approx(billions, rel=0.05)
    assert count_active_parameters(workload.model) / 1e9 == pytest.approx(active, rel=0.05)
    # 31 latent frames of 60 x 104 cells in patches of 2 x 2.
    assert workload.tokens["video"] == 31 * 30 * 52
    if "audio" in config.model.streams:
        # 121 frames at 24 fps at 44.1 kHz, in latent frames of 2048 samples, rounded up.
        assert workload.tokens["audio"] == -(-round(121 / 24 * 44100) // 2048) == 109
        assert any("audio codec is not on this machine" in note for note in workload.notes)


def test_tokens_of_sound_are_counted() -> None:
    workload = read_workload(load_config(ROOT / "configs" / "av_joint_tiny.yaml"), Given())
    assert dict(workload.tokens) == {"text": 16, "video": 8 * 4 * 4, "audio": 32}
    alone = read_workload(load_config(ROOT / "configs" / "t2a_tiny.yaml"), Given())
    assert dict(alone.tokens) == {"text": 16, "audio": 32}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_planner_finds_a_layout_of_a_large_recipe(name: str, tmp_path: Path) -> None:
    path, gpus = ROOT / "configs" / f"{name}.yaml", LARGE[name][2]
    file = tmp_path / "plan.json"
    arguments = ["--gpus", str(gpus), "--gpu-memory", "80", "--json", str(file)]
    assert main(["plan", str(path), *arguments]) == 0
    assert json.loads(file.read_text())


TABLE = [
    (name, int(gpus), int(gib))
    for name, gpus, gib in re.findall(
        r"^\| `(\w+)\.yaml` .* (\d+) GPUs of 80 GiB: (\d+) GiB each, planned",
        (ROOT / "configs" / "README.md").read_text(),
        re.MULTILINE,
    )
]


def test_the_table_has_every_large_recipe() -> None:
    large = {path.stem for path in (ROOT / "configs").glob("*.yaml") if "_tiny" not in path.stem}
    assert {name for name, _, _ in TABLE} == large


@pytest.mark.parametrize(("name", "gpus", "gib"), TABLE)
def test_the_table_says_what_the_planner_says_of_a_recipe_s_own_layout(
    name: str, gpus: int, gib: int
) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    args = parser.parse_args([str(path), "--gpus", str(gpus), "--gpu-memory", "80"])
    config = load_config(path)
    verdict = judge(Estimator(plan.settings_of(args, config)), config.parallel, config.remat)
    assert not verdict.problem
    assert verdict.estimate is not None
    assert round(verdict.estimate.memory.total / 2**30) == gib
