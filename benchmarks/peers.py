"""diffusers' transformers of the benchmark's shape, each beside ours with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    video_config,
)
from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    ModelMixin,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from kinodit.data.packing import patchify
from kinodit.models.importers import flux, hunyuan_video, sd3
from kinodit.models.tokens import TokenBatch

TABLE = 96  # patches along a side of SD3's position table
FRAMES = 4
"""Latent frames of a clip."""


@dataclass(frozen=True)
class Inputs:
    """One sample of noise for a pair, and the same as our batch.

    media:  [16, frames, rows, columns], or for FLUX, which takes patches, [N, 64]
    text:   [TEXT_TOKENS, TEXT_WIDTH]; pooled: [1, WIDTH]; t: [1]
    """

    media: Tensor
    text: Tensor
    pooled: Tensor
    t: Tensor
    batch: TokenBatch


def inputs_of(media: Tensor, position: Tensor, names: list[str]) -> Inputs:
    """`media` with random text; `names` are our streams in their order, one of them text."""
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=media.dtype)
    pooled, t = torch.randn(1, WIDTH, dtype=media.dtype), torch.tensor([0.5])
    (visual,) = (name for name in names if name != "text")
    latents = media if media.ndim == 2 else patchify(media, (1, 2, 2))
    batch = batch_of(visual, [(latents, position, text)], names, {"pooled": pooled}, t)
    return Inputs(media, text, pooled, t, batch)


def clip_of(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Noise [16, FRAMES, rows, columns] of so many tokens, and their positions."""
    side = round((num_tokens // FRAMES) ** 0.5)
    return torch.randn(16, FRAMES, 2 * side, 2 * side, dtype=dtype), grid(FRAMES, side, side)


def pair_of(
    name: str,
    theirs: ModelMixin,
    run: Callable[[], Tensor],
    blocks: list[nn.Module],
    importer: Any,
    batch: TokenBatch,
) -> Pair:
    """Theirs, and ours with its weights, which `importer` of `models/importers/` brings over."""
    config = importer.config(theirs.config)
    weights = importer.weights(theirs.config, theirs.state_dict())
    theirs_first = Contender(name, theirs, run, blocks, batch.num_tokens)
    return theirs_first, ours(name, config, weights, batch)


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
    image = torch.randn(16, 1, 2 * side, 2 * side, dtype=dtype)
    x = inputs_of(image, sd3.positions(side, side, TABLE), ["image", "text"])

    def run() -> Tensor:
        out = theirs(image[None, :, 0], x.text[None], x.pooled, 1000 * x.t).sample
        return patchify(out[0, :, None], (1, 2, 2))

    return pair_of("sd3", theirs, run, list(theirs.transformer_blocks), sd3, x.batch)


def flux_pair(num_tokens: int, dtype: torch.dtype) -> Pair:
    """FLUX: half of its blocks joint, half single."""
    half = depth(num_tokens, 2)
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
    x = inputs_of(torch.randn(num_tokens, 64, dtype=dtype), position, ["text", "image"])
    origin = torch.zeros(TEXT_TOKENS, 3)

    def run() -> Tensor:
        out = theirs(x.media[None], x.text[None], x.pooled, x.t, position, origin)
        return out.sample[0]

    blocks = [*theirs.transformer_blocks, *theirs.single_transformer_blocks]
    return pair_of("flux", theirs, run, blocks, flux, x.batch)


def hunyuan_pair(num_tokens: int, dtype: torch.dtype) -> Pair:
    """HunyuanVideo, on FRAMES latent frames."""
    half = depth(num_tokens, 2)
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
    x = inputs_of(*clip_of(num_tokens, dtype), ["video", "text"])
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)

    def run() -> Tensor:
        out = theirs(x.media[None], 1000 * x.t, x.text[None], mask, x.pooled).sample[0]
        return patchify(out, (1, 2, 2))

    blocks = [*theirs.transformer_blocks, *theirs.single_transformer_blocks]
    return pair_of("hunyuan", theirs, run, blocks, hunyuan_video, x.batch)


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
    x = inputs_of(*clip_of(num_tokens, dtype), ["text", "video"])

    def run() -> Tensor:
        return theirs(x.media[None], 1000 * x.t, x.text[None]).sample

    return Contender("wan", theirs, run, list(theirs.blocks), num_tokens), ours(
        "wan", video_config(depth(num_tokens)), None, x.batch
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
