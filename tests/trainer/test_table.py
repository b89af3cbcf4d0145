"""The table of shardings: strict, complete for every preset, and in the words of the config."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.presets import PRESETS
from kinodit.trainer.parallel.table import (
    Row,
    TableError,
    assign_splits,
    check_heads,
    mmdit_table,
)
from tests.support.synthetic import tiny_model_config


def unmade(config: MMDiTConfig) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(config)


VARIANTS = {
    "gelu": tiny_model_config(),
    "swiglu": tiny_model_config(activation="swiglu"),
    "rms": tiny_model_config(block_norm="rms", sandwich_norm=True, qk_norm="none"),
    "lora": tiny_model_config(modulation_rank=4),
    "double only": tiny_model_config(num_single_blocks=0, modulation_rank=4, block_norm="rms"),
    "single only": tiny_model_config(num_double_blocks=0, sandwich_norm=True),
    "no conditions": tiny_model_config(conditions={}),
    "experts": tiny_model_config(
        activation="swiglu",
        experts={
            "video": ExpertsConfig(4, 2, 1.0, 0.5),
            "text": ExpertsConfig(4, 2, 1.0, blocks=(0,)),
            "all": ExpertsConfig(2, 1, router=RouterConfig("modality")),
        },
    ),
}


@pytest.mark.parametrize("config", [*PRESETS.values(), *VARIANTS.values()])
def test_every_parameter_has_its_row_and_every_row_its_parameters(config: MMDiTConfig) -> None:
    model = unmade(config)
    splits = assign_splits(model, mmdit_table(config), 2)
    assert splits.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("preset", ["300m", "2b", "14b", "hunyuan_video"])
def test_each_rank_has_its_share_of_a_model(preset: str) -> None:
    model = unmade(PRESETS[preset])
    splits = assign_splits(model, mmdit_table(PRESETS[preset]), 4)
    total = mine = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        mine += parameter.numel() // (1 if splits[name].dim is None else 4)
    assert mine * 4 / total < 1.02


def test_matrices_that_are_seen_in_part_are_those_around_a_sum() -> None:
    splits = assign_splits(unmade(PRESETS["2b"]), mmdit_table(PRESETS["2b"]), 2)
    block = "joint_blocks.3.streams.video"
    assert splits[f"{block}.attention.q.weight"].dim == 0
    assert splits[f"{block}.attention.q.bias"].dim == 0
    assert splits[f"{block}.attention.out.weight"].dim == 1
    assert splits[f"{block}.attention.out.bias"].summed
    assert splits[f"{block}.mlp.down.weight"].part
    assert splits[f"{block}.attention.q_norm.weight"].dim is None
    assert not splits["heads.video.linear.weight"].part


def test_a_row_that_matches_nothing_is_named() -> None:
    config = tiny_model_config()
    rows = [*mmdit_table(config), Row("joint_blocks.*.streams.*.mlp.gate", "column")]
    with pytest.raises(TableError, match=r"match no parameter: \['joint_blocks.*gate'\]"):
        assign_splits(unmade(config), rows, 2)


def test_a_parameter_without_a_row_or_with_two_is_named() -> None:
    config = tiny_model_config()
    rows = [row for row in mmdit_table(config) if not row.pattern.endswith("_norm")]
    with pytest.raises(TableError, match=r"q_norm' must match one row .* found: none"):
        assign_splits(unmade(config), rows, 2)
    rows = [*mmdit_table(config), Row("embeds.video.linear", "whole")]
    with pytest.raises(TableError, match=r"found: embeds.\*.linear, embeds.video.linear"):
        assign_splits(unmade(config), rows, 2)


def test_a_row_that_can_split_nothing_is_named() -> None:
    config = tiny_model_config()
    rows = [
        replace(row, style="row") if row.pattern.endswith("q_norm") else row
        for row in mmdit_table(config)
    ]
    with pytest.raises(TableError, match=r"q_norm.weight has shape \(12,\), .* splits dim 1"):
        assign_splits(unmade(config), rows, 2)
    with pytest.raises(ConfigError, match=r"tp=5 does not divide 24, dim 0 of embeds.text.linear"):
        assign_splits(unmade(config), mmdit_table(config), 5)


def test_a_row_that_splits_nothing_of_what_it_matches_is_named() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Module()
            self.shift.bias = nn.Parameter(torch.zeros(8))

    with pytest.raises(TableError, match=r"split nothing of what they match: \['shift'\]"):
        assign_splits(Biased(), [Row("shift", "stored")], 2)
    assert assign_splits(Biased(), [Row("shift", "whole")], 2).keys() == {"shift.bias"}


def test_a_parameter_that_no_style_knows_is_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Module()
            self.gate.scale = nn.Parameter(torch.zeros(8))

    with pytest.raises(TableError, match=r"gate.scale: style 'column' of row 'gate' says nothing"):
        assign_splits(Scaled(), [Row("gate", "column")], 2)


def test_heads_are_split_then_exchanged() -> None:
    config = tiny_model_config(width=48, num_heads=8, num_kv_heads=4)
    check_heads(config, 4, 2)
    with pytest.raises(ConfigError, match=r"tp=8 must divide model.num_heads = 8 and the 4 key"):
        check_heads(config, 8, 1)
    with pytest.raises(
        ConfigError, match=r"= 4 ranks exchange heads; .* the 2 heads of 4 tp ranks"
    ):
        check_heads(config, 4, 4)
