"""What experts are worth on the demo set: a dense model beside two with experts, of equal FLOPs.

The runs of one seed see the same samples with the same noise, and are measured on the same packs at
the same noise levels. The dense model runs a second time with another seed, which changes weights,
order and the packs that are measured: what lies within that spread says nothing. `--size full`
trains the committed recipes for half of their steps and keeps the figures, whichever way they turn
out; the ci size trains a few per cent, and asks that every run learns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kinodit.models.flops import count_active_parameters, count_parameters
from kinodit.trainer.config import RunConfig, load_config
from tests.support.commands import kinodit
from tests.support.evidence import write_evidence
from tests.support.ranks import ROOT

DENSE, EXPERTS = "configs/t2v_tiny.yaml", "configs/t2v_moe_tiny.yaml"
BY_NOISE = (
    "model.experts.video.router.kind=timestep",
    "model.experts.video.router.balance=prior",
    "model.experts.video.router.loss_weight=1.0",
)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": (DENSE, ()),
    "dense_other_seed": (DENSE, ("run.seed=1",)),
    "experts": (EXPERTS, ()),
    "experts_by_noise": (EXPERTS, BY_NOISE),
}


def config_of(name: str) -> RunConfig:
    recipe, changes = RUNS[name]
    return load_config(ROOT / recipe, list(changes))


@pytest.fixture(scope="module")
def trained(size: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl by run."""
    root = tmp_path_factory.mktemp("experts")
    clips = "2000" if size == "full" else "300"
    demo = ["--num-clips", clips, "--num-images", "0", "--num-sounds", "0", "--no-real-clips"]
    kinodit("data", "demo", str(root / "data"), *demo)
    num_steps = 1000 if size == "full" else 120
    steps = [f"run.steps={num_steps}", f"schedule.decay_steps={num_steps * 3 // 10}"]
    names = list(RUNS) if size == "full" else ["dense", "experts_by_noise"]
    for name in names:
        recipe, changes = RUNS[name]
        kinodit(
            "train",
            str(ROOT / recipe),
            *changes,
            f"run.out_dir={root}",
            f"run.name={name}",
            f"data.datasets.theatre.path={root / 'data'}",
            "eval.num_samples=256",
            f"eval.every_steps={num_steps // 2 if size == 'ci' else 100}",
            "sample.every_steps=0",
            *steps,
            ranks=2,
        )
    return {name: rows_of(root / name) for name in names}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "validation"]


@pytest.mark.learning
def test_a_token_meets_as_many_parameters_in_each() -> None:
    dense = count_parameters(config_of("dense").model)
    for name in ("experts", "experts_by_noise"):
        model = config_of(name).model
        assert count_active_parameters(model) == pytest.approx(dense, rel=0.02)
        assert count_parameters(model) > 1.5 * dense


@pytest.mark.learning
@pytest.mark.timeout(14400)
def test_loss_by_noise_level(trained: dict[str, list[dict[str, Any]]], size: str) -> None:
    final = {}
    for name, rows in trained.items():
        rounds = validation(rows)
        first, last = rounds[0], rounds[-1]
        assert last["loss/video"] < (0.9 if size == "ci" else 0.6) * first["loss/video"], name
        assert last["loss_shuffled_captions/video"] > last["loss/video"], name
        final[name] = last
        bins = "  ".join(f"{t}: {loss:.4f}" for t, loss in last["bins"]["video"].items())
        print(f"{name:<18} {last['loss/video']:.4f}   {bins}")
    if size == "ci":
        return
    curves = {
        name: [[row["step"], row["loss/video"]] for row in validation(rows)]
        for name, rows in trained.items()
    }
    write_evidence(
        "experts",
        EXPERTS,
        {
            "command": "pytest -m learning --size full tests/learning/test_experts.py",
            "num_ranks": 2,
            "steps": final["dense"]["step"],
            "validation_loss": {name: row["loss/video"] for name, row in final.items()},
            "by_noise_level": {name: row["bins"]["video"] for name, row in final.items()},
            "curves": curves,
            "parameters": {name: count_parameters(config_of(name).model) for name in RUNS},
            "active_parameters": {
                name: count_active_parameters(config_of(name).model) for name in RUNS
            },
        },
    )
