"""diffusers' HunyuanVideo with random weights, copied in: the same outputs."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from kinodit.data.packing import patchify, unpatchify
from kinodit.models.errors import ConfigError
from kinodit.models.importers import hunyuan_video
from tests.models.packs import grid_positions
from tests.models.referee import assert_agrees, batch_of, build_ours, scramble

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 20,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_outputs_agree(guidance: bool) -> None:
    theirs = HunyuanVideoTransformer3DModel(**{**TINY, "guidance_embeds": guidance})
    scramble(theirs)
    config = hunyuan_video.config(theirs.config)
    weights = hunyuan_video.weights(theirs.config, theirs.state_dict())
    ours = build_ours(config, weights)
    generator = torch.Generator().manual_seed(1)
    grids, text_lengths, t = [(2, 3, 4), (3, 2, 2)], [5, 9], torch.tensor([0.3, 0.85])
    clips = [torch.randn(4, f, 2 * h, 2 * w, generator=generator) for f, h, w in grids]
    texts = [torch.randn(length, 20, generator=generator) for length in text_lengths]
    conditions = {"pooled": torch.randn(2, 12, generator=generator)}
    if guidance:
        conditions["guidance"] = torch.tensor([[6.0], [1.0]])
    batch = batch_of(
        {"video": [patchify(clip, (1, 2, 2)) for clip in clips], "text": texts},
        {
            # A latent frame of 24 fps video, compressed four times, every 1/6 s.
            "video": [grid_positions(*grid, fps=6) for grid in grids],
            "text": [torch.zeros(length, 3) for length in text_lengths],
        },
        t,
        conditions,
    )
    tokens = ours(batch)["video"].split([f * h * w for f, h, w in grids])
    longest = max(text_lengths)
    for index, clip in enumerate(clips):
        padded = torch.full((1, longest, 20), 0.5)
        padded[0, : text_lengths[index]] = texts[index]
        mask = (torch.arange(longest) < text_lengths[index])[None]
        expected = theirs(
            hidden_states=clip[None],
            timestep=1000 * t[index : index + 1],
            encoder_hidden_states=padded,
            encoder_attention_mask=mask,
            pooled_projections=conditions["pooled"][index : index + 1],
            guidance=1000 * conditions["guidance"][index] if guidance else None,
        ).sample[0]
        assert_agrees(unpatchify(tokens[index], grids[index], (1, 2, 2)), expected)


def test_image_to_video_is_refused() -> None:
    theirs = HunyuanVideoTransformer3DModel(**{**TINY, "image_condition_type": "token_replace"})
    with pytest.raises(ConfigError, match="only the text-to-video model"):
        hunyuan_video.config(theirs.config)
