"""The `data` section merges from YAML, types included, and refuses what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig, RangeConfig, WhereConfig
from kinodit.models.errors import ConfigError

RECIPE = """
datasets:
  clips:
    path: demo/data
    weight: 3
    where:
      modality: video
      has_audio: false
      duration_s: {min: 2, max: 10.5}
      scores: {motion: {min: 0.1}}
      extra: {action: moves}
height: 32
fps: 7.5
window: first
token_budget: 4096
"""


def merged(text: str) -> DataConfig:
    schema = OmegaConf.structured(DataConfig)
    config: Any = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(text)))
    assert isinstance(config, DataConfig)
    return config


def test_a_recipe_becomes_frozen_dataclasses() -> None:
    assert merged(RECIPE) == DataConfig(
        datasets={
            "clips": DatasetConfig(
                path="demo/data",
                weight=3.0,
                where=WhereConfig(
                    modality="video",
                    has_audio=False,
                    duration_s=RangeConfig(2.0, 10.5),
                    scores={"motion": RangeConfig(min=0.1)},
                    extra={"action": "moves"},
                ),
            )
        },
        height=32,
        fps=7.5,
        window="first",
        token_budget=4096,
    )
    assert merged("") == DataConfig()


@pytest.mark.parametrize(
    "text",
    [
        "hieght: 32",
        "height: tall",
        "window: middle",
        "datasets: {clips: {path: x, where: {modality: film}}}",
        "datasets: {clips: {path: x, where: {motion: 1}}}",
        "on_error: skip",
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(text: str) -> None:
    with pytest.raises(OmegaConfBaseException):
        merged(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, r"data\.height is 0"),
        ({"fps": -1.0}, r"data\.fps is -1"),
        ({"fps": float("nan")}, r"data\.fps is nan"),
        ({"samples_per_step": 0}, r"data\.samples_per_step is 0"),
        ({"num_threads": 0}, r"data\.num_threads is 0"),
        ({"token_budget": 0}, r"data\.token_budget is 0"),
        ({"cache_mib": -1}, "0 turns the cache off"),
        ({"decode_limit_s": 0.0}, r"data\.decode_limit_s is 0"),
        ({"max_frames": 0}, r"data\.max_frames is 0"),
        ({"audio_channels": 6}, "must be 1 or 2"),
        ({"audio_rate": 44}, "1000 to 192000"),
        ({"datasets": {"clips": DatasetConfig()}}, r"data\.datasets\.clips has no path"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**changes)


def test_a_range_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="min 2 above max 1"):
        RangeConfig(2, 1)


def test_the_window_lasts_its_frames() -> None:
    assert DecodeConfig(num_frames=12, fps=8.0).window_s == 1.5
