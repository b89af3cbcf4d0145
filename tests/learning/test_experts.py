"""What experts are worth on the demo set: a dense model beside two with experts, of equal FLOPs.

The runs of one seed see the same samples with the same noise, and are measured on the same packs at
the same noise levels; another seed changes all of that, so that models are compared seed by seed.
`--size full` trains the committed recipes for half of their steps with two seeds and keeps the
figures, whichever way they turn out; the ci size trains a few per cent, and asks that every run
learns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
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
    "experts": (EXPERTS, ()),
    "experts_by_noise": (EXPERTS, BY_NOISE),
}


def config_of(name: str) -> RunConfig:
    recipe, changes = RUNS[name]
    return load_config(ROOT / recipe, list(changes))


@dataclass(frozen=True)
class Finished:
    """A run's rows of metrics.jsonl."""

    name: str
    seed: int
    rows: list[dict[str, Any]]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """Those of validation, in order."""
        return [row for row in self.rows if row["kind"] == "validation"]


@pytest.fixture(scope="module")
def trained(size: str, tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    """Every run, to its end."""
    root = tmp_path_factory.mktemp("experts")
    clips = "2000" if size == "full" else "200"
    demo = ["--num-clips", clips, "--num-images", "0", "--num-sounds", "0", "--no-real-clips"]
    kinodit("data", "demo", str(root / "data"), *demo)
    num_steps = 1000 if size == "full" else 120
    names = list(RUNS) if size == "full" else ["dense", "experts_by_noise"]
    found = []
    for seed, name in product((0, 1) if size == "full" else (0,), names):
        recipe, changes = RUNS[name]
        kinodit(
            "train",
            str(ROOT / recipe),
            *changes,
            f"run.out_dir={root}",
            f"run.name={name}_{seed}",
            f"run.seed={seed}",
            f"run.steps={num_steps}",
            f"schedule.decay_steps={num_steps * 3 // 10}",
            f"data.datasets.theatre.path={root / 'data'}",
            f"eval.num_samples={256 if size == 'full' else 64}",
            f"eval.every_steps={num_steps // 2 if size == 'ci' else 100}",
            "sample.every_steps=0",
            ranks=2,
        )
        lines = (root / f"{name}_{seed}" / "metrics.jsonl").read_text().splitlines()
        found.append(Finished(name, seed, [json.loads(line) for line in lines]))
    return found


@pytest.mark.learning
def test_a_token_meets_as_many_parameters_in_each() -> None:
    dense = count_parameters(config_of("dense").model)
    for name in ("experts", "experts_by_noise"):
        model = config_of(name).model
        assert count_active_parameters(model) == pytest.approx(dense, rel=0.02)
        assert count_parameters(model) > 1.5 * dense


@pytest.mark.learning
@pytest.mark.timeout(14400)
def test_loss_by_noise_level(trained: list[Finished], size: str) -> None:
    figures: list[dict[str, Any]] = []
    for run in trained:
        first, last = run.validation[0], run.validation[-1]
        assert last["loss/video"] < (0.9 if size == "ci" else 0.6) * first["loss/video"], run.name
        assert last["loss_shuffled_captions/video"] > last["loss/video"], run.name
        levels = last["bins"]["video"]
        bins = "  ".join(f"{t}: {loss:.4f}" for t, loss in levels.items())
        print(f"{run.name:<18} seed {run.seed}   {last['loss/video']:.4f}   {bins}")
        model = config_of(run.name).model
        figures.append(
            {
                "model": run.name,
                "seed": run.seed,
                "parameters": count_parameters(model),
                "active_parameters": count_active_parameters(model),
                "validation_loss": last["loss/video"],
                "by_noise_level": levels,
                "curve": [[row["step"], row["loss/video"]] for row in run.validation],
            }
        )
    if size == "full":
        write_evidence(
            "experts",
            EXPERTS,
            {
                "command": "pytest -m learning --size full tests/learning/test_experts.py",
                "num_ranks": 2,
                "steps": trained[0].validation[-1]["step"],
                "runs": figures,
            },
        )
