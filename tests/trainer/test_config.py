from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kinodit.models.diffusion.objective import RectifiedFlowConfig
from kinodit.models.diffusion.timesteps import ModeTimesteps
from kinodit.models.encoders.wavelet import WaveletConfig
from kinodit.models.errors import ConfigError
from kinodit.models.presets import PRESETS
from kinodit.trainer.config import (
    check_resumable,
    config_to_dict,
    config_to_yaml,
    differences,
    load_config,
    schema,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_choices_select_their_dataclass(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "modalities: {video: {codec: {name: wavelet, spatial_levels: 3}}}\n"
        "objective: {timesteps: {name: mode, scale: 0.5}}\n",
    )
    config = load_config(path, ["objective.prediction=x0"])
    assert config.modalities.video.codec == WaveletConfig(spatial_levels=3)
    assert isinstance(config.objective, RectifiedFlowConfig)
    assert config.objective.prediction == "x0"
    assert config.objective.timesteps == ModeTimesteps(scale=0.5)


def test_preset_is_a_base_for_the_fields_beside_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: {preset: tiny, num_double_blocks: 9}"))
    assert config.model.num_double_blocks == 9
    assert config.model.width == PRESETS["tiny"].width
    assert list(config.model.streams) == list(PRESETS["tiny"].streams)


def test_overrides_beat_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 1e-3}")
    assert load_config(path).optim.lr == 1e-3
    assert load_config(path, ["optim.lr=2e-4"]).optim.lr == 2e-4


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("run: {stepz: 3}", [], "Did you mean: 'steps'"),
        ("run: {steps: many}", [], "run.steps"),
        ("modle: {}", [], "modle"),
        ("objective: {name: ddpm}", [], "rectified_flow"),
        ("model: {preset: huge}", [], "tiny"),
        ("run: {steps: 0}", [], "at least 1"),
        ("run: {name: ../up}", [], "plain folder name"),
        ("[1, 2]", [], "mapping"),
        ("a: [", [], "not YAML"),
        ("{}", ["steps"], "key=value"),
        ("optim: {betas: [0.9, 1.5]}", [], "betas"),
        ("run: {name: '${oc.env:HOME}'}", [], "run.name='${oc.env:HOME}': recipes are not"),
        ("sample: {prompts: [a, '${run.name}']}", [], "sample.prompts[1]="),
        ("{}", ["run.out_dir=${oc.env:HOME}"], "run.out_dir="),
        ("modalities: {video: {patch: [0, 1, 1]}}", [], "patch"),
        (
            "sample: {negative: blurred, guidance: {scale: 1.0}}",
            [],
            "sample.negative='blurred' is the caption of the pass without the prompt",
        ),
        ("ema: {main: {}}", ["sample.ema=mian"], "sample.ema=mian: there is no such average; ema"),
        ("eval: {ema: main}", [], "eval.ema=main: there is no such average; ema has []"),
        (
            "data: {packing: budget}",
            ["engine.micro_batches=2"],
            "engine.micro_batches=2 merges packs, which data.packing=budget has filled",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value) or overrides
    assert "\n" not in str(caught.value)


def test_the_resolved_recipe_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: {preset: tiny}\noptim: {betas: [0.8, 0.9]}"))
    assert load_config(write(tmp_path, config_to_yaml(config))) == config


def test_resume_refuses_what_changes_the_curve_and_lists_all_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {steps: 5}")
    saved = config_to_yaml(load_config(path))
    allowed = ["parallel.dp_replicate=2", "log.every_steps=1", "remat.mode=full"]
    check_resumable(saved, load_config(path, allowed), tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_resumable(saved, load_config(path, ["optim.lr=0.5", "run.seed=7"]), tmp_path)
    assert "optim.lr" in str(caught.value) and "run.seed: was 0, is 7" in str(caught.value)
    older = saved.replace("  eps: 1.0e-08\n", "")
    assert older != saved
    check_resumable(older, load_config(path), tmp_path)


def test_differences_cover_keys_of_either_side() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        ("a.b", 1, 3),
        ("c", 2, None),
        ("d", None, 4),
    ]


def test_schema_lists_every_key_of_the_resolved_recipe(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "{}"))
    known = {row.key for row in schema()}
    sections = config_to_dict(config)
    for section in ("run", "optim", "schedule", "parallel", "precision", "log", "checkpoint"):
        assert {f"{section}.{key}" for key in sections[section]} <= known
    assert yaml.safe_load(config_to_yaml(config))["run"]["steps"] == 1000
