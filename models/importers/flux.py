"""FLUX.1 (Black Forest Labs, 2024), from diffusers.

Time runs as here (t = 1 is noise, the model predicts noise - data). Positions are
(0, row, column) for image tokens and 0 for text, which is then not turned at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.importers.convert import (
    conditions,
    convert,
    joint_blocks,
    linear,
    single_blocks,
    swap_halves,
)
from kinodit.models.rope import RopeConfig


def config(theirs: Mapping[str, Any]) -> MMDiTConfig:
    """Our config from `FluxTransformer2DModel`'s."""
    heads = theirs["num_attention_heads"]
    vectors = {"pooled": ConditionConfig(theirs["pooled_projection_dim"])}
    if theirs["guidance_embeds"]:
        vectors["guidance"] = ConditionConfig(1, "scalar")
    return MMDiTConfig(
        streams={
            "text": StreamConfig(theirs["joint_attention_dim"], output=False, position="none"),
            "image": StreamConfig(theirs["in_channels"], out_channels=theirs["out_channels"]),
        },
        conditions=vectors,
        width=heads * theirs["attention_head_dim"],
        num_heads=heads,
        num_double_blocks=theirs["num_layers"],
        num_single_blocks=theirs["num_single_layers"],
        rope=RopeConfig(axes=tuple(theirs["axes_dims_rope"])),
    )


def weights(theirs_config: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from `FluxTransformer2DModel`'s."""
    width = theirs_config["num_attention_heads"] * theirs_config["attention_head_dim"]
    rows = [
        *linear("x_embedder", "embeds.image.linear"),
        *linear("context_embedder", "embeds.text.linear"),
        *conditions(theirs_config["guidance_embeds"]),
        *joint_blocks("image", r"\d+", qk_norm=True),
        *single_blocks(width),
        *linear(r"norm_out\.linear", "heads.image.modulation.linear", swap_halves),
        *linear("proj_out", "heads.image.linear"),
    ]
    return convert(theirs, rows)
