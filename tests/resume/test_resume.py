"""Interrupted equals uninterrupted: bit for bit on the same ranks, to 1e-12 on others."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint import FileSystemReader

from kinodit.trainer import checkpoint
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.run import train
from kinodit.trainer.topology import Topology
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

STEPS = 6
MESH = Mesh(torch.device("cpu"))
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Start:
    """One start of a run: how it is laid out and after how many steps it is interrupted."""

    recipe: Path
    name: str
    stop_after: int = 0
    dp_replicate: int = 1
    overrides: tuple[str, ...] = ()


def run_case(rank: int, world_size: int, start: Start) -> None:
    config = load_config(
        start.recipe,
        [
            f"run.name={start.name}",
            f"run.stop_after_steps={start.stop_after}",
            f"parallel.dp_replicate={start.dp_replicate}",
            *start.overrides,
        ],
    )
    train(config, Topology(rank, world_size, rank), torch.device("cpu"), io.StringIO())


def final_tensors(recipe: Path, name: str) -> Arrays:
    """Every tensor of a run's last checkpoint, whole."""
    (*_, path) = checkpoint.find_checkpoints(recipe.parent / "runs" / name)
    assert checkpoint.load_state(path).step == STEPS
    return tensors_of(path)


def tensors_of(path: Path) -> Arrays:
    """Every tensor of a checkpoint, whole."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in metadata.items()
    }
    checkpoint.load(path, tensors, MESH)
    return {key: value.numpy() for key, value in tensors.items()}


def metrics(recipe: Path, name: str) -> list[tuple[int, float, float]]:
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def assert_equal_bits(ours: Arrays, theirs: Arrays) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key in theirs if not np.array_equal(ours[key], theirs[key])]
    assert not different


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    return tiny_recipe(
        root, write_dataset(root), run={"steps": STEPS, "out_dir": str(root / "runs")}
    )


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> Arrays:
    run_case(0, 1, Start(recipe, "whole"))
    return final_tensors(recipe, "whole")


@pytest.mark.parametrize("step", quick(range(1, STEPS), 1, 3))
def test_resumed_at_any_step_is_bit_equal(step: int, recipe: Path, uninterrupted: Arrays) -> None:
    name = f"stopped{step}"
    run_case(0, 1, Start(recipe, name, stop_after=step))
    run_case(0, 1, Start(recipe, name))
    assert_equal_bits(final_tensors(recipe, name), uninterrupted)
    assert metrics(recipe, name) == metrics(recipe, "whole")


def test_training_moves_every_tensor(recipe: Path, uninterrupted: Arrays) -> None:
    moved = [key for key in uninterrupted if np.any(uninterrupted[key] != 0)]
    assert len(moved) > 0.9 * len(uninterrupted)


@pytest.mark.gloo
@pytest.mark.parametrize("dp_replicate", quick([1, 2, 4], 2))
def test_four_ranks_resume_bit_equal(dp_replicate: int, recipe: Path, four: Ranks) -> None:
    whole, cut = f"four{dp_replicate}", f"four{dp_replicate}-cut"
    four.run(run_case, Start(recipe, whole, dp_replicate=dp_replicate))
    for stop_after in (2, 0):
        four.run(run_case, Start(recipe, cut, stop_after, dp_replicate))
    assert_equal_bits(final_tensors(recipe, cut), final_tensors(recipe, whole))
    assert metrics(recipe, cut) == metrics(recipe, whole)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("num_ranks", "axes"),
    quick([(2, "tp=2"), (4, "cp=2"), (4, "cp=2 ring=2"), (4, "tp=2")], (2, "tp=2")),
)
def test_ranks_that_share_packs_resume_bit_equal(
    num_ranks: int, axes: str, recipe: Path, groups: dict[int, Ranks]
) -> None:
    whole = f"shared{num_ranks}-{axes[:2]}{len(axes)}"
    cut = f"{whole}-cut"
    ranks = groups[num_ranks]
    layout = [f"parallel.{axis}" for axis in axes.split()]
    sampling = (
        "sample.every_steps=4",
        "sample.prompts=[a red square moves left]",
        "sample.sampler.steps=2",
    )
    extra = (*layout, "eval.every_steps=4", "eval.num_samples=3", *sampling)
    ranks.run(run_case, Start(recipe, whole, overrides=extra))
    for stop_after in (2, 0):
        ranks.run(run_case, Start(recipe, cut, stop_after, overrides=extra))
    assert_equal_bits(final_tensors(recipe, cut), final_tensors(recipe, whole))
    assert metrics(recipe, cut) == metrics(recipe, whole)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("dp_replicate", [1, 4])
def test_evaluating_and_sampling_leave_training_alone(
    dp_replicate: int, recipe: Path, four: Ranks
) -> None:
    plain, watched = f"plain{dp_replicate}", f"watched{dp_replicate}"
    four.run(run_case, Start(recipe, plain, dp_replicate=dp_replicate))
    extra = (
        "eval.every_steps=2",
        "eval.num_samples=5",
        "eval.ema=main",
        "sample.every_steps=3",
        "sample.prompts=[a red square moves left]",
        "sample.ema=main",
        "sample.sampler.steps=2",
    )
    four.run(run_case, Start(recipe, watched, dp_replicate=dp_replicate, overrides=extra))
    assert_equal_bits(final_tensors(recipe, watched), final_tensors(recipe, plain))


@pytest.mark.gloo
@pytest.mark.slow
def test_other_number_of_ranks_agrees_in_float64(recipe: Path, four: Ranks) -> None:
    float64 = tuple(f"precision.{part}=float64" for part in ("params", "compute", "reduce"))
    run_case(0, 1, Start(recipe, "f64", overrides=float64))
    four.run(run_case, Start(recipe, "f64-4to1", 3, overrides=float64))
    run_case(0, 1, Start(recipe, "f64-4to1", overrides=float64))
    run_case(0, 1, Start(recipe, "f64-1to4", 3, overrides=float64))
    four.run(run_case, Start(recipe, "f64-1to4", dp_replicate=2, overrides=float64))
    run_case(0, 1, Start(recipe, "f64-1to-cp4", 3, overrides=float64))
    shared = ("parallel.cp=4", "parallel.ring=2")
    four.run(run_case, Start(recipe, "f64-1to-cp4", overrides=(*float64, *shared)))
    split = ("parallel.tp=2",)
    four.run(run_case, Start(recipe, "f64-tp2-to-cp4", 3, overrides=(*float64, *split)))
    four.run(run_case, Start(recipe, "f64-tp2-to-cp4", overrides=(*float64, *shared)))
    four.run(run_case, Start(recipe, "f64-cp4-to-tp2", 3, overrides=(*float64, *shared)))
    four.run(run_case, Start(recipe, "f64-cp4-to-tp2", overrides=(*float64, *split)))
    reference = final_tensors(recipe, "f64")
    scale = max(float(np.abs(value).max()) for value in reference.values())
    for name in ("f64-4to1", "f64-1to4", "f64-1to-cp4", "f64-tp2-to-cp4", "f64-cp4-to-tp2"):
        tensors = final_tensors(recipe, name)
        worst = max(float(np.abs(tensors[key] - reference[key]).max()) for key in reference)
        assert worst / scale < 1e-12
