"""Experts that the noise level decides: the same for all of a level, and put together before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.cache import Fused, cached_experts
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.moe.layer import moe_layers
from kinodit.models.moe.router import Choice, Router
from kinodit.models.tokens import TokenBatch
from tests.models.packs import randomize
from tests.support.synthetic import synthetic_pack, tiny_model_config

TIMESTEP = ExpertsConfig(4, 2, 1.0, 0.5, router=RouterConfig("timestep", renormalise=False))
NOISE_LEVEL = ExpertsConfig(3, 1, 1.0, router=RouterConfig("noise_level"))


def model_of(experts: ExpertsConfig, dtype: torch.dtype = torch.float32, **more: object) -> MMDiT:
    config = tiny_model_config(
        width=32, num_heads=4, condition_width=24, experts={"video": experts, "all": experts}
    )
    model = MMDiT(replace(config, **more))  # type: ignore[arg-type]
    randomize(model)
    return model.to(dtype)


def batch_at(levels: list[float], dtype: torch.dtype = torch.float32) -> TokenBatch:
    batch = synthetic_pack(0, [0, 1, 5], dtype)
    return replace(batch.in_dtype(dtype), level_t=torch.tensor(levels))


def chosen(model: MMDiT, batch: TokenBatch) -> list[Tensor]:
    """What each router answers, layer by layer."""
    made: list[Tensor] = []

    def note(module: nn.Module, inputs: object, output: Choice) -> None:
        made.append(output.index)

    hooks = [
        part.register_forward_hook(note) for part in model.modules() if isinstance(part, Router)
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return made


def test_the_same_level_has_the_same_experts_whatever_the_content() -> None:
    model = model_of(TIMESTEP)
    batch = batch_at([0.3, 0.3, 0.3])
    for index in chosen(model, batch):
        assert len(index) > 3 and (index == index[0]).all()
    others = {name: -3 * tokens.latents for name, tokens in batch.modalities.items()}
    pooled = {name: vector + 5 for name, vector in batch.conditions.items()}
    again = replace(batch.with_latents(others), conditions=pooled)
    pairs = zip(chosen(model, batch), chosen(model, again), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    far = chosen(model, batch_at([0.95, 0.95, 0.95]))
    assert any((a[0] != b[0]).any() for a, b in zip(far, chosen(model, batch), strict=True))


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("experts", [TIMESTEP, NOISE_LEVEL], ids=["timestep", "noise_level"])
def test_fused_experts_are_routed_experts(experts: ExpertsConfig, activation: str) -> None:
    model = model_of(experts, activation=activation)
    with torch.no_grad():
        for t in (0.2, 0.7):
            batch = batch_at([t, t, t])
            expected = model(batch)["video"]
            with cached_experts(model):
                first, second = model(batch)["video"], model(batch)["video"]
            assert (first - expected).abs().max() <= 1e-6 * expected.abs().max()
            assert torch.equal(first, second)


def test_each_level_is_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = Fused.__init__

    def counted(self: Fused, experts: object, choice: Choice) -> None:
        made.append(1)
        original(self, experts, choice)  # type: ignore[arg-type]

    monkeypatch.setattr(Fused, "__init__", counted)
    model = model_of(TIMESTEP)
    with torch.no_grad(), cached_experts(model):
        for t in (0.9, 0.9, 0.5, 0.5, 0.5):
            model(batch_at([t, t, t]))
        assert len(made) == 2 * len(moe_layers(model))
        model(batch_at([0.1, 0.2, 0.3]))
        assert len(made) == 2 * len(moe_layers(model))
    with torch.no_grad():
        model(batch_at([0.9, 0.9, 0.9]))
    assert all(layer.fuse is None for layer in moe_layers(model).values())


def test_passes_with_gradients_are_routed() -> None:
    model = model_of(TIMESTEP, torch.float64)
    batch = batch_at([0.4, 0.4, 0.4], torch.float64)
    with cached_experts(model):
        model(batch)["video"].square().sum().backward()
    weight = model.get_parameter("joint_blocks.0.streams.video.mlp.router.weight")
    assert weight.grad is not None and weight.grad.abs().max() > 0
