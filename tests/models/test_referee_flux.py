"""diffusers' FLUX with random weights, copied in: the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from kinodit.models.importers import flux
from kinodit.models.importers.convert import WeightsError
from kinodit.models.importers.folder import load_released
from tests.models.packs import grid_positions
from tests.models.referee import assert_agrees, batch_of, build_ours, scramble

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}


def tiny(guidance: bool) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(**{**TINY, "guidance_embeds": guidance})
    scramble(model)
    return model


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_outputs_agree(guidance: bool) -> None:
    theirs = tiny(guidance)
    config = flux.config(theirs.config)
    ours = build_ours(config, flux.weights(theirs.config, theirs.state_dict()))
    generator = torch.Generator().manual_seed(1)
    grids, text_lengths, t = [(1, 4, 6), (1, 7, 3)], [5, 9], torch.tensor([0.3, 0.85])
    positions = [grid_positions(*grid) for grid in grids]
    images = [torch.randn(len(where), 16, generator=generator) for where in positions]
    texts = [torch.randn(length, 20, generator=generator) for length in text_lengths]
    conditions = {"pooled": torch.randn(2, 12, generator=generator)}
    if guidance:
        conditions["guidance"] = torch.tensor([[3.5], [1.0]])
    batch = batch_of(
        {"text": texts, "image": images},
        {"text": [torch.zeros(length, 3) for length in text_lengths], "image": positions},
        t,
        conditions,
    )
    tokens = ours(batch)["image"].split([len(where) for where in positions])
    for index, image in enumerate(images):
        expected = theirs(
            hidden_states=image[None],
            encoder_hidden_states=texts[index][None],
            pooled_projections=conditions["pooled"][index : index + 1],
            timestep=t[index : index + 1],
            img_ids=positions[index],
            txt_ids=torch.zeros(text_lengths[index], 3),
            guidance=conditions["guidance"][index] if guidance else None,
        ).sample[0]
        assert_agrees(tokens[index], expected)


def test_a_folder_is_read(tmp_path: Path) -> None:
    theirs = tiny(guidance=True)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, weights = load_released(tmp_path)
    build_ours(config, weights)
    bias = theirs.single_transformer_blocks[1].proj_out.bias
    assert torch.equal(weights["single_blocks.1.mlp.down.bias"], bias)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config.json"):
        load_released(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(WeightsError, match="of class 'UNet2DModel'; one of"):
        load_released(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(WeightsError, match=r"no \*.safetensors"):
        load_released(tmp_path)
