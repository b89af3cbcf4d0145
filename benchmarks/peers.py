"""diffusers' transformers of the benchmark's shape, each beside ours with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import (
    HEAD_DIM,
    HEADS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    WIDTH,
    Contender,
    Pair,
    batch_of,
    depth,
    grid,
    ours,
    randomize,
    video_batch,
    video_config,
)
from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from kinodit.data.packing import patchify
from kinodit.models.importers import flux, hunyuan_video, sd3

TABLE = 96  # patches along a side of SD3's position table


def sd3_model(num_layers: int, side: int) -> SD3Transformer2DModel:
    """SD3 of the benchmark's width; `side` is that of its latents."""
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=num_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=TABLE,
    )
    randomize(model)
    return model


def sd3_pair(num_tokens: int, dtype: torch.dtype) -> Pair:
    """SD3, no RoPE and no QK norm on either side."""
    side = round(num_tokens**0.5)
    theirs = sd3_model(depth(num_tokens), 2 * side).to(dtype)
    image = torch.randn(1, 16, 2 * side, 2 * side, dtype=dtype)
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=dtype)
    pooled, t = torch.randn(1, WIDTH, dtype=dtype), torch.tensor([0.5])
    latents = patchify(image[0, :, None], (1, 2, 2))
    position = sd3.positions(side, side, TABLE)
    batch = batch_of("image", [(latents, position, text)], ["image", "text"], {"pooled": pooled}, t)
    config, weights = sd3.config(theirs.config), sd3.weights(theirs.config, theirs.state_dict())

    def run() -> Tensor:
        return patchify(theirs(image, text[None], pooled, 1000 * t).sample[0, :, None], (1, 2, 2))

    blocks = list(theirs.transformer_blocks)
    return Contender("sd3", theirs, run, blocks, num_tokens + TEXT_TOKENS), ours(
        "sd3", config, weights, batch
    )


def flux_pair(num_tokens: int, dtype: torch.dtype) -> Pair:
    """FLUX: half of its blocks joint, half single."""
    half = depth(num_tokens) // 2
    theirs = FluxTransformer2DModel(
        in_channels=64,
        num_layers=half,
        num_single_layers=half,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(16, 24, 24),
    )
    randomize(theirs)
    theirs.to(dtype)
    side = round(num_tokens**0.5)
    position = grid(1, side, side)
    image = torch.randn(num_tokens, 64, dtype=dtype)
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=dtype)
    pooled, t = torch.randn(1, WIDTH, dtype=dtype), torch.tensor([0.5])
    batch = batch_of("image", [(image, position, text)], ["text", "image"], {"pooled": pooled}, t)
    config = flux.config(theirs.config)
    weights = flux.weights(theirs.config, theirs.state_dict())
    origin = torch.zeros(TEXT_TOKENS, 3)

    def run() -> Tensor:
        return theirs(image[None], text[None], pooled, t, position, origin).sample[0]

    blocks = [*theirs.transformer_blocks, *theirs.single_transformer_blocks]
    return Contender("flux", theirs, run, blocks, num_tokens + TEXT_TOKENS), ours(
        "flux", config, weights, batch
    )


def hunyuan_pair(num_tokens: int, dtype: torch.dtype) -> Pair:
    """HunyuanVideo, on 4 latent frames."""
    half = depth(num_tokens) // 2
    theirs = HunyuanVideoTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=half,
        num_single_layers=half,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(16, 24, 24),
        guidance_embeds=False,
    )
    randomize(theirs)
    theirs.to(dtype)
    side = round((num_tokens // 4) ** 0.5)
    clip = torch.randn(1, 16, 4, 2 * side, 2 * side, dtype=dtype)
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=dtype)
    pooled, t = torch.randn(1, WIDTH, dtype=dtype), torch.tensor([0.5])
    latents, position = patchify(clip[0], (1, 2, 2)), grid(4, side, side)
    batch = batch_of("video", [(latents, position, text)], ["video", "text"], {"pooled": pooled}, t)
    config = hunyuan_video.config(theirs.config)
    weights = hunyuan_video.weights(theirs.config, theirs.state_dict())
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)

    def run() -> Tensor:
        out = theirs(clip, 1000 * t, text[None], mask, pooled).sample[0]
        return patchify(out, (1, 2, 2))

    blocks = [*theirs.transformer_blocks, *theirs.single_transformer_blocks]
    return Contender("hunyuan", theirs, run, blocks, num_tokens + TEXT_TOKENS), ours(
        "hunyuan", config, weights, batch
    )


def wan_pair(num_tokens: int, dtype: torch.dtype) -> Pair:
    """Wan, whose text comes by cross-attention, against our joint blocks with RoPE and QK norm."""
    theirs = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=depth(num_tokens),
    )
    randomize(theirs)
    theirs.to(dtype)
    side = round((num_tokens // 4) ** 0.5)
    clip = torch.randn(1, 16, 4, 2 * side, 2 * side, dtype=dtype)
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=dtype)
    t = torch.tensor([0.5])
    batch = video_batch(clip[0], text, t)

    def run() -> Tensor:
        return theirs(clip, 1000 * t, text[None]).sample

    return Contender("wan", theirs, run, list(theirs.blocks), num_tokens), ours(
        "wan", video_config(depth(num_tokens)), None, batch
    )


def packed_pair(dtype: torch.dtype) -> tuple[Contender, Contender, float]:
    """Eight images of different sizes: SD3 on a padded batch, ours on a pack; share of padding.

    SD3 runs without a mask over the padding, which is cheaper than the right thing.
    """
    sizes = [(12, 12), (16, 16), (20, 16), (20, 20), (24, 20), (28, 28), (32, 26), (32, 32)]
    side = 32
    theirs = sd3_model(2, 2 * side).to(dtype)
    padded = torch.randn(len(sizes), 16, 2 * side, 2 * side, dtype=dtype)
    text = torch.randn(len(sizes), TEXT_TOKENS, TEXT_WIDTH, dtype=dtype)
    pooled, t = torch.randn(len(sizes), WIDTH, dtype=dtype), torch.rand(len(sizes))
    samples = [
        (
            patchify(padded[index, :, None, : 2 * rows, : 2 * columns], (1, 2, 2)),
            sd3.positions(rows, columns, TABLE),
            text[index],
        )
        for index, (rows, columns) in enumerate(sizes)
    ]
    batch = batch_of("image", samples, ["image", "text"], {"pooled": pooled}, t)
    config, weights = sd3.config(theirs.config), sd3.weights(theirs.config, theirs.state_dict())
    full = len(sizes) * (side**2 + TEXT_TOKENS)
    contender = Contender(
        "sd3 padded",
        theirs,
        lambda: theirs(padded, text, pooled, 1000 * t).sample,
        list(theirs.transformer_blocks),
        full,
    )
    return contender, ours("packed", config, weights, batch), 1 - batch.num_tokens / full


PAIRS: dict[str, Callable[[int, torch.dtype], Pair]] = {
    "sd3": sd3_pair,
    "flux": flux_pair,
    "hunyuan": hunyuan_pair,
    "wan": wan_pair,
}
