"""HunyuanVideo (arXiv 2412.03603), from diffusers.

Time runs as here (t = 1 is noise, the model predicts noise - data). Its time axis counts latent
frames; with `RopeConfig.time_scale` at 6 a latent frame of 24 fps video, compressed 4 times, is one
unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.errors import ConfigError
from kinodit.models.importers.convert import (
    Row,
    conditions,
    convert,
    feed_forward,
    flatten_patches,
    joint_blocks,
    linear,
    single_blocks,
    swap_halves,
    vector_mlp,
)
from kinodit.models.rope import RopeConfig


def config(theirs: Mapping[str, Any]) -> MMDiTConfig:
    """Our config from `HunyuanVideoTransformer3DModel`'s.

    Raises:
        ConfigError: the model is an image-to-video one that takes the image outside of its tokens.
    """
    if theirs["image_condition_type"] is not None:
        raise ConfigError(
            f"image_condition_type = {theirs['image_condition_type']!r}: only the text-to-video "
            "model (None) can be imported"
        )
    heads = theirs["num_attention_heads"]
    patch = theirs["patch_size_t"] * theirs["patch_size"] ** 2
    vectors = {"pooled": ConditionConfig(theirs["pooled_projection_dim"])}
    if theirs["guidance_embeds"]:
        vectors["guidance"] = ConditionConfig(1, "scalar")
    return MMDiTConfig(
        streams={
            "video": StreamConfig(
                theirs["in_channels"] * patch, out_channels=theirs["out_channels"] * patch
            ),
            "text": StreamConfig(
                theirs["text_embed_dim"],
                output=False,
                position="none",
                refiner_blocks=theirs["num_refiner_layers"],
            ),
        },
        conditions=vectors,
        width=heads * theirs["attention_head_dim"],
        num_heads=heads,
        num_double_blocks=theirs["num_layers"],
        num_single_blocks=theirs["num_single_layers"],
        mlp_ratio=theirs["mlp_ratio"],
        rope=RopeConfig(
            axes=tuple(theirs["rope_axes_dim"]), base=theirs["rope_theta"], time_scale=6.0
        ),
    )


def weights(theirs_config: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from `HunyuanVideoTransformer3DModel`'s."""
    width = theirs_config["num_attention_heads"] * theirs_config["attention_head_dim"]
    rows = [
        Row(r"x_embedder\.proj\.weight", ("embeds.video.linear.weight",), flatten_patches),
        Row(r"x_embedder\.proj\.bias", ("embeds.video.linear.bias",)),
        *_refiner(),
        *conditions(theirs_config["guidance_embeds"]),
        *joint_blocks("video", r"\d+", qk_norm=True),
        *single_blocks(width),
        *linear(r"norm_out\.linear", "heads.video.modulation.linear", swap_halves),
        *linear("proj_out", "heads.video.linear"),
    ]
    return convert(theirs, rows)


def _refiner() -> list[Row]:
    source, target = "context_embedder", "embeds.text.refiner"
    block, ours = rf"{source}\.token_refiner\.refiner_blocks\.(\d+)", rf"{target}.blocks.\1"
    rows = [
        *linear(rf"{source}\.proj_in", "embeds.text.linear"),
        *vector_mlp(rf"{source}\.time_text_embed\.timestep_embedder", f"{target}.time"),
        *vector_mlp(rf"{source}\.time_text_embed\.text_embedder", f"{target}.pooled"),
        *linear(rf"{block}\.norm1", f"{ours}.attention_norm"),
        *linear(rf"{block}\.norm2", f"{ours}.mlp_norm"),
        *linear(rf"{block}\.attn\.to_out\.0", f"{ours}.out"),
        *linear(rf"{block}\.norm_out\.linear", f"{ours}.modulation"),
        *feed_forward(rf"{block}\.ff", f"{ours}.mlp"),
    ]
    for part in ("q", "k", "v"):
        rows += linear(rf"{block}\.attn\.to_{part}", f"{ours}.{part}")
    return rows
