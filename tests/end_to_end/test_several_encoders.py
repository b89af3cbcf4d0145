"""Several encoders of text in one model: SD3's and FLUX's kinds, as docs/encoders.md has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kinodit.launch.cli import main
from kinodit.launch.plan.workload import Given, read_workload
from kinodit.models.errors import ConfigError
from kinodit.trainer.config import load_config
from tests.support.ranks import ROOT
from tests.support.recipes import tiny_recipe, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("several"), 4)


def documented() -> dict[str, Any]:
    """The example of the documents, with encoders that need no folder."""
    document = (ROOT / "docs" / "encoders.md").read_text()
    (example,) = (b for b in re.findall(r"```yaml\n(.*?)```", document, re.DOTALL) if "more:" in b)
    found: dict[str, Any] = yaml.safe_load(example)
    text = found["modalities"]["text"]
    text["encoder"] = {"name": "bytes", "dim": 16, "max_tokens": 40}
    for number, name in enumerate(text["more"]):
        text["more"][name] = {"name": "bytes", "dim": 6 + 2 * number, "max_tokens": 20 + number}
    return found


@pytest.mark.slow
def test_streams_and_conditions_of_several_encoders_are_trained_and_drawn(
    tmp_path: Path, dataset: Path
) -> None:
    example = documented()
    recipe = tiny_recipe(tmp_path, dataset, run={"steps": 2}, data={"samples_per_step": 4})
    whole = yaml.safe_load(recipe.read_text())
    whole["modalities"]["text"] = example["modalities"]["text"]
    whole["model"] |= example["model"]
    recipe.write_text(yaml.safe_dump(whole))
    assert main(["train", str(recipe)]) == 0
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("train") == 2
    prompt = ["--prompt", "a red square moves left", "--steps", "2"]
    assert main(["sample", str(run), *prompt]) == 0
    workload = read_workload(load_config(recipe), Given())
    # The long encoder's stream, and that of one of the short ones; the other is pooled alone.
    assert dict(workload.tokens) == {"text": 40, "video": 8, "clip": 20}
    dims = {name: condition.dim for name, condition in workload.model.conditions.items()}
    assert dims == {"text_pooled": 16, "clip_pooled": 6, "clip_2_pooled": 8}
    assert workload.model.streams["clip"].in_channels == 6


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modalities.text.more.video", "{name: bytes}", "modalities.text.more.video: the name"),
        ("modalities.text.more.clip", "{dim: 4}", "modalities.text.more.clip has no name"),
        ("modalities.text.more.clip", "{name: words}", "more.clip.name='words': there is bytes"),
        ("modalities.text.dropout", "{clip: 0.5}", "dropout.clip=0.5: it must be 0 to 1, of one"),
        ("modalities.text.dropout", "{text: 1.5}", "dropout.text=1.5: it must be 0 to 1"),
    ],
)
def test_what_cannot_be_is_named(
    key: str, value: str, message: str, tmp_path: Path, dataset: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tiny_recipe(tmp_path, dataset), [f"{key}={value}"])


def test_an_encoder_that_nothing_uses_is_an_error(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(tmp_path, dataset))
    assert main(["train", recipe, "modalities.text.more.clip={name: bytes}"]) == 2
    error = capsys.readouterr().err
    assert "neither a stream of the model nor a condition" in error and "clip_pooled" in error
