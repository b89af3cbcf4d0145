"""diffusers' SD3 with random weights, copied in: the same outputs."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from kinodit.data.packing import patchify, unpatchify
from kinodit.models.errors import ConfigError
from kinodit.models.importers import sd3
from kinodit.models.importers.convert import WeightsError
from tests.models.referee import assert_agrees, batch_of, build_ours, scramble

TINY = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("num_layers", [1, 3])
@torch.no_grad()
def test_outputs_agree(qk_norm: str | None, num_layers: int) -> None:
    theirs = SD3Transformer2DModel(**{**TINY, "qk_norm": qk_norm, "num_layers": num_layers})
    scramble(theirs)
    config = sd3.config(theirs.config)
    ours = build_ours(config, sd3.weights(theirs.config, theirs.state_dict()))
    generator = torch.Generator().manual_seed(1)
    sizes, text_lengths, t = [(16, 12), (8, 20)], [5, 9], torch.tensor([0.3, 0.85])
    images = [torch.randn(4, *size, generator=generator) for size in sizes]
    texts = [torch.randn(length, 20, generator=generator) for length in text_lengths]
    pooled = torch.randn(2, 12, generator=generator)
    grids = [(1, height // 2, width // 2) for height, width in sizes]
    batch = batch_of(
        {"image": [patchify(image[:, None], (1, 2, 2)) for image in images], "text": texts},
        {
            "image": [sd3.positions(rows, columns, 12) for _, rows, columns in grids],
            "text": [torch.zeros(length, 3) for length in text_lengths],
        },
        t,
        {"pooled": pooled},
    )
    tokens = ours(batch)["image"].split([rows * columns for _, rows, columns in grids])
    for index, image in enumerate(images):
        expected = theirs(
            hidden_states=image[None],
            encoder_hidden_states=texts[index][None],
            pooled_projections=pooled[index : index + 1],
            timestep=1000 * t[index : index + 1],
        ).sample[0]
        found = unpatchify(tokens[index], grids[index], (1, 2, 2))[:, 0]
        assert_agrees(found, expected)


def test_a_second_attention_is_refused() -> None:
    theirs = SD3Transformer2DModel(**{**TINY, "dual_attention_layers": (0,)})
    with pytest.raises(ConfigError, match="second attention"):
        sd3.config(theirs.config)


def test_weights_of_another_depth_are_refused() -> None:
    theirs = SD3Transformer2DModel(**TINY)
    weights = {name: x for name, x in theirs.state_dict().items() if "add_k_proj" not in name}
    with pytest.raises(WeightsError, match=r"nothing found for .*add_k_proj"):
        sd3.weights(theirs.config, weights)
    weights = {**theirs.state_dict(), "lora.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"unknown names \['lora.weight'\]"):
        sd3.weights(theirs.config, weights)
