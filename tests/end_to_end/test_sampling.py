"""Sampled clips: the same bits on any number of ranks, from the weights that were asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinodit.launch.cli import main
from kinodit.models.diffusion.samplers import SamplerConfig
from kinodit.trainer.config import load_config
from kinodit.trainer.run import train
from kinodit.trainer.sampling import load_run, sample_run
from kinodit.trainer.topology import Topology
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

PROMPTS = ("a red square moves left", "a blue square moves right", "a green square moves left")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sampling")
    path = tiny_recipe(root, write_dataset(root), run={"steps": 3, "out_dir": str(root / "runs")})
    config = load_config(path, ["optim.lr=0.01"])
    train(config, Topology(0, 1, 0), torch.device("cpu"), io.StringIO())
    return config.run.folder


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    group = Ranks(3)
    yield group
    group.close()


def draw(rank: int, world_size: int, run_dir: Path, folder: Path, ema: str, seed: int) -> None:
    config = load_run(run_dir)
    settings = replace(config.sample, ema=ema, seed=seed, sampler=SamplerConfig("heun", 3))
    topology = Topology(rank, world_size, rank)
    sample_run(run_dir, config, settings, PROMPTS[:2], folder, None, topology, torch.device("cpu"))


def clips(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.mp4"))]


@pytest.mark.gloo
def test_clips_do_not_depend_on_the_number_of_ranks(
    run_dir: Path, three: Ranks, tmp_path: Path
) -> None:
    draw(0, 1, run_dir, tmp_path / "one", "main", 0)
    three.run(draw, run_dir, tmp_path / "three", "main", 0)
    assert len(clips(tmp_path / "one")) == 2
    assert clips(tmp_path / "one") == clips(tmp_path / "three")


def test_seed_and_average_matter(run_dir: Path, tmp_path: Path) -> None:
    for name, ema, seed in (("a", "main", 0), ("b", "main", 1), ("c", "", 0)):
        draw(0, 1, run_dir, tmp_path / name, ema, seed)
    assert clips(tmp_path / "a") != clips(tmp_path / "b")
    assert clips(tmp_path / "a") != clips(tmp_path / "c")


def test_an_average_that_does_not_exist_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run_dir), "--prompt", "x", "--ema", "mian"]) == 2
    error = capsys.readouterr().err
    assert "mian" in error and "main" in error


def test_a_step_without_checkpoint_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run_dir), "--prompt", "x", "--step", "2"]) == 2
    assert "steps 3" in capsys.readouterr().err
