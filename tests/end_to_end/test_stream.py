"""A run that streams says that it is not exact, wherever it is told of."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kinodit.launch.cli import main
from kinodit.models.errors import ConfigError
from kinodit.trainer.config import load_config
from kinodit.trainer.streams import check_streams
from tests.support.recipes import tiny_recipe, write_dataset


def test_a_run_from_compressed_archives_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path)
    (tmp_path / "web").mkdir()
    archive = (data / "000000.tar").read_bytes()
    (tmp_path / "web" / "0.tar.gz").write_bytes(gzip.compress(archive))
    recipe = tiny_recipe(tmp_path, tmp_path / "web")
    streamed = (
        "data.datasets.clips.stream.shards=[0.tar.gz]",
        "data.datasets.clips.stream.num_samples=12",
    )
    options = ("run.steps=2", "log.ledger=true", "eval.every_steps=0", *streamed)
    assert main(["train", str(recipe), *options]) == 0
    assert "not exact: clips is a stream" in capsys.readouterr().err
    run = tmp_path / "runs" / "tiny"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("not exact" in row["message"] for row in events if row["event"] == "warning")
    (manifest,) = (run / "checkpoints").glob("*/manifest.json")
    said = json.loads(manifest.read_text())["facts"]["plan"]["datasets"]["clips"]
    assert said["is_exact"] is False
    assert main(["data", "verify-ledger", str(run)]) == 1
    assert "not exact: clips is a stream" in capsys.readouterr().out
    assert main(["data", "plan", str(recipe), *options]) == 0
    assert "not exact: clips is a stream" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert "not exact: clips" in (run / "report.html").read_text()

    with pytest.raises(ConfigError, match="ranks share their samples"):
        check_streams(load_config(recipe, [*options, "parallel.cp=2"]))
    with pytest.raises(ConfigError, match="the loss is measured on"):
        check_streams(load_config(recipe, [*options, "eval.every_steps=1"]))
