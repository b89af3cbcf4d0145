"""Named sizes are the sizes their names say, and those of the released models to the parameter."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
)

from kinodit.models.flops import count_parameters
from kinodit.models.presets import PRESETS


@pytest.mark.parametrize(
    ("name", "billions"),
    [("300m", 0.3), ("2b", 2), ("8b", 8), ("14b", 14), ("14b_av", 14), ("30b", 30)],
)
def test_a_name_is_its_number_of_parameters(name: str, billions: float) -> None:
    assert count_parameters(PRESETS[name]) / 1e9 == pytest.approx(billions, rel=0.08)


@pytest.mark.parametrize("name", ["8b", "14b", "14b_av", "30b"])
def test_large_presets_divide_over_eight_ranks(name: str) -> None:
    config = PRESETS[name]
    assert config.num_heads % 8 == 0
    assert config.kv_heads % 8 == 0
    assert config.hidden(config.width) % 8 == 0


def test_sizes_of_released_models_are_exact() -> None:
    with torch.device("meta"):
        released = {
            "sd3_medium": SD3Transformer2DModel(
                num_layers=24,
                num_attention_heads=24,
                caption_projection_dim=1536,
                pos_embed_max_size=192,
            ),
            "flux_dev": FluxTransformer2DModel(guidance_embeds=True),
            "hunyuan_video": HunyuanVideoTransformer3DModel(),
        }
    for name, model in released.items():
        expected = sum(parameter.numel() for parameter in model.parameters())
        assert count_parameters(PRESETS[name]) == expected, name
