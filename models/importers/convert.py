"""From one state dict to another by a table of names, where every row must match."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinodit.models.errors import UserError


class WeightsError(UserError):
    """Weights that are not those of the model they are read as."""


Change = Callable[[Tensor], Sequence[Tensor]]


def keep(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor as it is."""
    return (tensor,)


def flatten_patches(weight: Tensor) -> Sequence[Tensor]:
    """A patch embedding's convolution [d, C, (pt,) ph, pw] -> linear [d, C * pt * ph * pw]."""
    return (weight.flatten(1),)


def swap_halves(tensor: Tensor) -> Sequence[Tensor]:
    """(scale, shift) along dim 0 -> (shift, scale)."""
    scale, shift = tensor.chunk(2)
    return (torch.cat([shift, scale]),)


@dataclass(frozen=True)
class Row:
    r"""One row of a table.

    source:  pattern that must match the whole foreign name
    targets: our names, with groups of the pattern as \1, \2, ...; one for each tensor that
             `change` returns
    """

    source: str
    targets: tuple[str, ...]
    change: Change = keep


def linear(source: str, target: str, change: Change = keep) -> list[Row]:
    """Rows for weight and bias of a linear layer."""
    return [Row(rf"{source}\.{part}", (f"{target}.{part}",), change) for part in ("weight", "bias")]


def convert(theirs: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Our state dict from a foreign one.

    Raises:
        WeightsError: a foreign name that no row knows, or a row that no name matches.
    """
    ours: dict[str, Tensor] = {}
    used: set[int] = set()
    unknown = []
    for name, tensor in theirs.items():
        for index, row in enumerate(rows):
            match = re.fullmatch(row.source, name)
            if match is None:
                continue
            used.add(index)
            for target, part in zip(row.targets, row.change(tensor), strict=True):
                ours[match.expand(target)] = part
            break
        else:
            unknown.append(name)
    unmatched = [row.source for index, row in enumerate(rows) if index not in used]
    if unknown or unmatched:
        raise WeightsError(
            f"these weights are not of this model: unknown names {sorted(unknown)[:5]} "
            f"({len(unknown)} in all), nothing found for {unmatched[:5]} ({len(unmatched)} in "
            "all); check that the weights and the config belong together"
        )
    return ours


def vector_mlp(source: str, target: str) -> list[Row]:
    """A two-layer embedding MLP."""
    return [
        *linear(rf"{source}\.linear_1", f"{target}.input"),
        *linear(rf"{source}\.linear_2", f"{target}.output"),
    ]


def conditions(guidance: bool) -> list[Row]:
    """Time, pooled text and, if the model is distilled with it, guidance."""
    source, target = "time_text_embed", "condition"
    rows = [
        *vector_mlp(rf"{source}\.timestep_embedder", f"{target}.time"),
        *vector_mlp(rf"{source}\.text_embedder", f"{target}.vectors.pooled"),
    ]
    if guidance:
        rows += vector_mlp(rf"{source}\.guidance_embedder", f"{target}.vectors.guidance")
    return rows


def joint_blocks(visual: str, indices: str, qk_norm: bool, context_out: bool = True) -> list[Row]:
    """Joint blocks whose index matches the pattern `indices`; the other stream is "text".

    `context_out` is false for SD3's last block, where text ends.
    """
    block = rf"transformer_blocks\.({indices})"
    ours = r"joint_blocks.\1.streams"
    rows: list[Row] = []
    for part in ("q", "k", "v"):
        rows += linear(rf"{block}\.attn\.to_{part}", f"{ours}.{visual}.attention.{part}")
        rows += linear(rf"{block}\.attn\.add_{part}_proj", f"{ours}.text.attention.{part}")
    if qk_norm:
        for part in ("q", "k"):
            norm = f"attention.{part}_norm.weight"
            rows.append(Row(rf"{block}\.attn\.norm_{part}\.weight", (f"{ours}.{visual}.{norm}",)))
            rows.append(Row(rf"{block}\.attn\.norm_added_{part}\.weight", (f"{ours}.text.{norm}",)))
    rows += linear(rf"{block}\.attn\.to_out\.0", f"{ours}.{visual}.attention.out")
    rows += linear(rf"{block}\.norm1\.linear", f"{ours}.{visual}.modulation.linear")
    rows += feed_forward(rf"{block}\.ff", f"{ours}.{visual}.mlp")
    change = keep if context_out else swap_halves
    rows += linear(rf"{block}\.norm1_context\.linear", f"{ours}.text.modulation.linear", change)
    if context_out:
        rows += linear(rf"{block}\.attn\.to_add_out", f"{ours}.text.attention.out")
        rows += feed_forward(rf"{block}\.ff_context", f"{ours}.text.mlp")
    return rows


def feed_forward(source: str, target: str) -> list[Row]:
    """An MLP."""
    return [
        *linear(rf"{source}\.net\.0\.proj", f"{target}.up"),
        *linear(rf"{source}\.net\.2", f"{target}.down"),
    ]


def single_blocks(width: int) -> list[Row]:
    """FLUX's single-stream blocks, whose way out is one matrix for attention and MLP."""

    def split(weight: Tensor) -> Sequence[Tensor]:
        return weight[:, :width], weight[:, width:]

    block = r"single_transformer_blocks\.(\d+)"
    ours = r"single_blocks.\1"
    rows = [
        *linear(rf"{block}\.norm\.linear", f"{ours}.modulation.linear"),
        *linear(rf"{block}\.proj_mlp", f"{ours}.mlp.up"),
        Row(
            rf"{block}\.proj_out\.weight",
            (f"{ours}.attention.out.weight", f"{ours}.mlp.down.weight"),
            split,
        ),
        Row(rf"{block}\.proj_out\.bias", (f"{ours}.mlp.down.bias",)),
    ]
    for part in ("q", "k", "v"):
        rows += linear(rf"{block}\.attn\.to_{part}", f"{ours}.attention.{part}")
    for part in ("q", "k"):
        target = f"{ours}.attention.{part}_norm.weight"
        rows.append(Row(rf"{block}\.attn\.norm_{part}\.weight", (target,)))
    return rows
