"""AdamW with moments of 8 bits: near AdamW, alike on every layout, refused where it cannot be."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor

from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.certify.trace import trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import RunConfig
from kinodit.trainer.optim import (
    AdamW8bitConfig,
    MuonConfig,
    OptimConfig,
    build_optimizer,
    optimizer_bytes,
)
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.deferred import initial_values, materialize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

Arrays = dict[str, NDArray[Any]]
NUM_STEPS = 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 2))


def trained(config: OptimConfig, num_steps: int = NUM_STEPS) -> tuple[nn.Module, Any]:
    model = net()
    optimizer = build_optimizer(config, model)
    go_on(model, optimizer, range(num_steps))
    return model, optimizer


def go_on(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.set_lr(1e-3)
        optimizer.step()


def test_it_is_nearly_adamw_and_not_quite() -> None:
    ours, _ = trained(AdamW8bitConfig(weight_decay=0.1))
    theirs, _ = trained(OptimConfig(weight_decay=0.1))
    start = net()
    weights = [one[0].weight.detach() for one in (ours, theirs, start)]  # type: ignore[index]
    moved, expected = weights[0] - weights[2], weights[1] - weights[2]
    assert 1e-4 < float((moved - expected).norm() / expected.norm()) < 0.05
    # What is too small for 8 bits has whole moments.
    torch.testing.assert_close(ours[1].weight, theirs[1].weight, atol=2e-4, rtol=0)  # type: ignore[index]


def test_state_is_codes_and_scales_and_loads_bit_for_bit() -> None:
    whole, _ = trained(AdamW8bitConfig())
    model, optimizer = trained(AdamW8bitConfig(), 2)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert saved["exp_avg_codes/0.weight"].dtype == torch.uint8
    assert saved["exp_avg_sq_scale/0.weight"].shape == (32, 1)
    assert saved["exp_avg/1.weight"].shape == (2, 32)
    again = net()
    again.load_state_dict(model.state_dict())
    fresh = build_optimizer(AdamW8bitConfig(), again)
    for name, tensor in fresh.state().items():
        tensor.copy_(saved[name])
    fresh.set_num_steps(2)
    go_on(again, fresh, range(2, NUM_STEPS))
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="float64"):
        build_optimizer(AdamW8bitConfig(), net().double())
    with pytest.raises(ConfigError, match="leave every moment"):
        build_optimizer(AdamW8bitConfig(), nn.Linear(64, 64))

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"kinodit\[torchao\]"):
        build_optimizer(AdamW8bitConfig(), net())


def test_a_certificate_is_of_adamw() -> None:
    small = twin(RunConfig(optim=AdamW8bitConfig(lr=3e-4, weight_decay=0.2)))
    assert small.config.optim == OptimConfig(lr=3e-4, weight_decay=0.2)
    assert ("optim.name", "adamw8bit", "adamw") in small.shrunk


@pytest.mark.parametrize("config", [OptimConfig(), MuonConfig(), AdamW8bitConfig()], ids=str)
def test_bytes_are_those_of_its_tensors(config: OptimConfig) -> None:
    model = MMDiT(tiny_model_config(width=64))
    optimizer = build_optimizer(config, model)
    optimizer.state()
    storages = {t.untyped_storage().data_ptr(): t for t in optimizer.tensors()}
    held = sum(t.untyped_storage().nbytes() for t in storages.values())
    parts = [(name, tuple(p.shape), p.numel()) for name, p in model.named_parameters()]
    assert held == optimizer_bytes(config, parts, 4)


def eight_bit_twin() -> Twin:
    """A twin whose optimizer was put back: matrices of 64 x 256 take 8 bits."""
    small = twin(RunConfig(model=tiny_model_config(width=64, num_heads=4)))
    return replace(small, config=replace(small.config, optim=AdamW8bitConfig(lr=3e-3)))


@pytest.mark.gloo
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ParallelConfig(dp_shard=4), marks=pytest.mark.slow),
        ParallelConfig(dp_replicate=2, dp_shard=2),
    ],
    ids=str,
)
def test_blocks_do_not_depend_on_the_layout(layout: ParallelConfig, four: Ranks) -> None:
    """In bfloat16, as there is no float64.

    Three updates move a weight by up to three learning rates; matrices differ by a seventh of one
    in the root mean square, and by half of one if the ranks differ by a fifth in their updates.
    """
    small = eight_bit_twin()
    reference = trace(0, 1, small, ParallelConfig(dp_shard=1), "bfloat16")
    matrices = {name: value for name, value in reference.parameters.items() if value.ndim == 2}
    for found in four.run(trace, small, layout, "bfloat16"):
        for name, value in matrices.items():
            far = np.linalg.norm(found.parameters[name] - value) / value.size**0.5
            assert far < 0.25 * small.config.optim.lr, name


def quantised_shapes(rank: int, world_size: int, layout: ParallelConfig) -> dict[str, Any]:
    mesh = build_mesh(layout, world_size, rank, torch.device("cpu"))
    model = MMDiT(tiny_model_config(width=128, num_heads=4))
    parallelize(model, mesh, layout, PrecisionConfig(), RematConfig(), compile_blocks=False)
    materialize(model, initial_values(0), mesh.device)
    optimizer = build_optimizer(AdamW8bitConfig(), model)
    for number, tensor in enumerate(optimizer.state().values()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.fill_(number % 200)
    return {
        name: (tuple(tensor.shape), tensor.full_tensor().double().mean().item())
        for name, tensor in optimizer.state().items()
        if isinstance(tensor, DTensor)
    }


@pytest.mark.gloo
def test_state_has_whole_shapes_on_every_layout(four: Ranks) -> None:
    found = four.run(quantised_shapes, ParallelConfig(dp_shard=2, tp=2))
    scales = {name: shape for name, (shape, _) in found[0].items() if "exp_avg_scale" in name}
    assert scales["exp_avg_scale/joint_blocks.0.streams.video.mlp.down.weight"] == (128, 2)
    for number, (name, (_, mean)) in enumerate(found[0].items()):
        assert mean == number % 200, name


@pytest.mark.gloo
def test_rows_that_tp_cuts_within_a_block_are_refused(four: Ranks) -> None:
    with pytest.raises(Exception, match=r"parallel\.tp leaves 128 columns of .*mlp\.down"):
        four.run(quantised_shapes, ParallelConfig(dp_shard=1, tp=4))
