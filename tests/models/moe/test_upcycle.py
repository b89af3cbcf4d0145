"""A dense model with experts put in says what it said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.init import initial_value
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.moe.upcycle import upcycled_values
from tests.models.packs import randomize
from tests.support.synthetic import synthetic_pack, tiny_model_config

DENSE = tiny_model_config(width=32, num_heads=4)
COPIED = ExpertsConfig(4, 2, 4.0)
FIRST = ExpertsConfig(4, 1, 4.0)
SHARED = ExpertsConfig(8, 2, 0.5, 4.0, router=RouterConfig(scores="sigmoid", renormalise=False))


def initial(name: str, shape: Sequence[int]) -> Tensor:
    return initial_value(name, shape, 3)


def pair(
    experts: ExpertsConfig, dtype: torch.dtype, noise: float = 0.0, config: MMDiTConfig = DENSE
) -> tuple[MMDiT, MMDiT]:
    """A dense model and one with experts made of it."""
    dense = MMDiT(config)
    randomize(dense)
    weights = dict(dense.named_parameters())
    larger = replace(config, experts={"video": experts, "all": experts})
    values = upcycled_values(larger, lambda name, _: weights[name].detach(), initial, noise, 0)
    made = MMDiT(larger)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(values(name, parameter.shape))
    return dense.to(dtype), made.to(dtype)


def outputs(models: tuple[MMDiT, MMDiT], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch = synthetic_pack(0, [0, 1, 5], dtype)
    batch = replace(batch, conditions={k: v.to(dtype) for k, v in batch.conditions.items()})
    batch = replace(batch, level_t=torch.tensor([0.1, 0.5, 0.9]))
    with torch.no_grad():
        return models[0](batch)["video"], models[1](batch)["video"]


@pytest.mark.parametrize("experts", [COPIED, FIRST, SHARED], ids=["copied", "first", "shared"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_it_says_the_same(experts: ExpertsConfig, dtype: torch.dtype, limit: float) -> None:
    dense, made = outputs(pair(experts, dtype), dtype)
    assert (made - dense).abs().max() <= limit * dense.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_expert_with_a_gate_of_one_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    models = pair(FIRST, dtype)
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()
    dense, made = outputs(models, dtype)
    assert torch.equal(dense, made)


def test_noise_makes_experts_differ() -> None:
    dense, made = outputs(pair(COPIED, torch.float64, noise=0.1), torch.float64)
    assert (made - dense).abs().max() > 1e-4 * dense.abs().max()
    _, model = pair(COPIED, torch.float64, noise=0.1)
    up = model.get_parameter("joint_blocks.0.streams.video.mlp.experts.up")
    spread = (up[0] - up[1]).std() / up.std()
    assert 0.1 < spread < 0.2


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(4, 2, 2.0),
        ExpertsConfig(4, 2, 4.0, 1.0),
        ExpertsConfig(4, 2, 4.0, router=RouterConfig(renormalise=False)),
        ExpertsConfig(4, 2, 4.0, router=RouterConfig(scale=2.0)),
    ],
)
def test_what_would_say_something_else_is_refused(experts: ExpertsConfig) -> None:
    with pytest.raises(ConfigError, match=r"experts\.video cannot start as the dense"):
        pair(experts, torch.float64)
