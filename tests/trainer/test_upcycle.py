"""A model with experts starts from the checkpoint of one without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.parallel.deferred import initial_values, materialize
from kinodit.trainer.upcycle import UpcycleConfig, starting_values
from tests.models.packs import randomize
from tests.support.checkpoints import MESH, save
from tests.support.synthetic import synthetic_pack, tiny_model_config

DENSE = tiny_model_config(width=32, num_heads=4)
ROUTED = replace(DENSE, experts={"video": ExpertsConfig(4, 2, 4.0)})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MMDiT]:
    """The folder of a run, and the model whose weights its newest checkpoint has."""
    root = tmp_path_factory.mktemp("dense")
    model = MMDiT(DENSE)
    for step in (1, 2):
        randomize(model, seed=step)
        save(root, step, tensors={f"model/{name}": p for name, p in model.named_parameters()})
    return root, model


def test_it_says_what_the_newest_checkpoint_said(dense: tuple[Path, MMDiT]) -> None:
    folder, model = dense
    values = starting_values(UpcycleConfig(str(folder)), ROUTED, 0, MESH)
    with torch.device("meta"):
        made = MMDiT(ROUTED)
    materialize(made, values, MESH.device)
    batch = synthetic_pack(0, [0, 1, 5])
    with torch.no_grad():
        expected, found = (one.double()(batch)["video"] for one in (model, made))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_without_a_run_weights_start_as_always() -> None:
    values = starting_values(UpcycleConfig(), ROUTED, 3, MESH)
    name = "joint_blocks.0.streams.video.mlp.experts.up"
    assert torch.equal(values(name, (4, 8, 8)), initial_values(3)(name, (4, 8, 8)))


def test_what_cannot_be_started_from_is_refused(dense: tuple[Path, MMDiT], tmp_path: Path) -> None:
    folder = str(dense[0])
    with pytest.raises(ConfigError, match="no checkpoint in that folder"):
        starting_values(UpcycleConfig(str(tmp_path)), ROUTED, 0, MESH)
    with pytest.raises(ConfigError, match="the model has no experts"):
        starting_values(UpcycleConfig(folder), DENSE, 0, MESH)
    wider = replace(ROUTED, width=64)
    values = starting_values(UpcycleConfig(folder), wider, 0, MESH)
    with pytest.raises(ConfigError, match=r"for heads\.video\.linear\.weight of shape \[6, 64\]"):
        values("heads.video.linear.weight", (6, 64))
    with pytest.raises(ConfigError, match="noise=-1"):
        UpcycleConfig(noise=-1)
