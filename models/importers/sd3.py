"""Stable Diffusion 3 and 3.5 large (Esser et al., arXiv 2403.03206), from diffusers.

Time runs as here (t = 1 is noise, the model predicts noise - data), so nothing is turned round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.errors import ConfigError
from kinodit.models.importers.convert import (
    Row,
    conditions,
    convert,
    flatten_patches,
    joint_blocks,
    linear,
    swap_halves,
)


def config(theirs: Mapping[str, Any]) -> MMDiTConfig:
    """Our config from `SD3Transformer2DModel`'s.

    Raises:
        ConfigError: the model has a second attention in some blocks (SD 3.5 medium).
    """
    if theirs["dual_attention_layers"]:
        raise ConfigError(
            f"dual_attention_layers = {tuple(theirs['dual_attention_layers'])}: blocks with a "
            "second attention (SD 3.5 medium) cannot be imported; SD 3 and SD 3.5 large can"
        )
    patch = theirs["patch_size"]
    base = theirs["sample_size"] // patch
    heads = theirs["num_attention_heads"]
    return MMDiTConfig(
        streams={
            "image": StreamConfig(
                in_channels=theirs["in_channels"] * patch**2,
                out_channels=theirs["out_channels"] * patch**2,
                position="sincos_2d",
                position_scale=base / theirs["pos_embed_max_size"],
            ),
            "text": StreamConfig(theirs["joint_attention_dim"], output=False, position="none"),
        },
        conditions={"pooled": ConditionConfig(theirs["pooled_projection_dim"])},
        width=heads * theirs["attention_head_dim"],
        num_heads=heads,
        num_double_blocks=theirs["num_layers"],
        qk_norm="none" if theirs["qk_norm"] is None else "rms",
    )


def weights(theirs_config: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from `SD3Transformer2DModel`'s."""
    patch, last = theirs_config["patch_size"], theirs_config["num_layers"] - 1

    def channels_first(tensor: Tensor) -> Sequence[Tensor]:
        """Rows in the order (row, column, channel) -> (channel, row, column)."""
        cells = tensor.unflatten(0, (patch, patch, -1))
        return (torch.movedim(cells, 2, 0).flatten(0, 2),)

    has_norm = theirs_config["qk_norm"] is not None
    rows = [
        Row(r"pos_embed\.proj\.weight", ("embeds.image.linear.weight",), flatten_patches),
        Row(r"pos_embed\.proj\.bias", ("embeds.image.linear.bias",)),
        *linear("context_embedder", "embeds.text.linear"),
        *conditions(guidance=False),
        *joint_blocks("image", str(last), has_norm, context_out=False),
        *linear(r"norm_out\.linear", "heads.image.modulation.linear", swap_halves),
        *linear("proj_out", "heads.image.linear", channels_first),
    ]
    if last:
        rows += joint_blocks("image", r"\d+", has_norm)
    learned = {name: tensor for name, tensor in theirs.items() if name != "pos_embed.pos_embed"}
    return convert(learned, rows)


def positions(rows: int, columns: int, table_size: int) -> Tensor:
    """[rows * columns, 3] float32: where SD3 sees the patches of an image.

    Its table of `table_size` x `table_size` patches is cropped in the middle.
    """
    top, left = (table_size - rows) // 2, (table_size - columns) // 2
    row = torch.arange(top, top + rows, dtype=torch.float32)
    column = torch.arange(left, left + columns, dtype=torch.float32)
    return torch.cartesian_prod(torch.zeros(1), row, column)
