"""docs/first-run.md, docs/tasks.md and docs/in-context.md, to the letter."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinodit.data.media import read_mp4
from kinodit.launch.cli import main
from kinodit.models.random import generator
from kinodit.trainer.gallery import NOT_GIVEN
from tests.support.ranks import ROOT
from tests.support.recipes import write_clips

DOCUMENT = (ROOT / "docs" / "first-run.md").read_text()


def test_every_command_works_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "clips", 8)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    commands = re.findall(r"^\$ kinodit (.*)$", DOCUMENT, re.MULTILINE)
    assert len(commands) == 9
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "first"
    assert (run / "samples" / "manual" / "000.mp4").stat().st_size > 0
    assert "a red square moves left" in (run / "report.html").read_text()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000004",
    ]


def test_tasks_are_trained_and_sampled_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "clips", 8, with_sound=True)
    document = (ROOT / "docs" / "tasks.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    commands = re.findall(r"^\$ kinodit (.*)$", document, re.MULTILINE)
    assert len(commands) == 8
    lengths, negatives, parts = [], [], []
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
        folder = tmp_path / "runs" / "tasks" / "samples" / "manual"
        if command.startswith("sample"):
            (entry,) = json.loads((folder / "index.json").read_text())
            lengths.append((entry["num_frames"], "sound" in entry))
            negatives.append(entry.get("negative"))
            parts.append(entry.get("given"))
            if "--box" in command:
                # The box that was asked for, the lower half, is grey, as far as mp4 keeps it.
                given, _ = read_mp4(folder / entry["given"])
                hole = np.abs(given.astype(int) - NOT_GIVEN).max(-1) < 12
                assert hole[:, 8:].mean() > 0.8 and hole[:, :7].mean() < 0.1
    assert lengths == [(5, True), (5, False), (5, False), (5, True), (9, True), (13, True)]
    assert negatives == ["noise, a jump", None, None, None, None, None]
    assert parts == [None, "000.given.mp4", "000.given.mp4", None, None, None]
    losses = [
        json.loads(line)
        for line in (tmp_path / "runs" / "tasks" / "metrics.jsonl").read_text().splitlines()
    ]
    trained = [row for row in losses if row["kind"] == "train"]
    assert trained and all(row["loss/video"] > 0 and row["loss/audio"] > 0 for row in trained)


def test_edits_are_trained_and_drawn_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits").mkdir()
    for number in range(6):
        before = generator("edits", number).integers(0, 256, size=(20, 24, 3)).astype(np.uint8)
        for name, pixels in (("ref0.png", before), ("png", before[:, :, ::-1])):
            Image.fromarray(pixels.copy()).save(tmp_path / "edits" / f"e{number:02d}.{name}")
        (tmp_path / "edits" / f"e{number:02d}.txt").write_text("make it blue")
    document = (ROOT / "docs" / "in-context.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    commands = re.findall(r"^\$ kinodit (.*)$", document, re.MULTILINE)
    assert len(commands) == 7
    drawn = []
    folder = tmp_path / "runs" / "edits" / "samples" / "manual"
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
        if command.startswith("sample"):
            drawn.append((folder / "000.png").read_bytes())
    # A group begins with other noise than a picture alone.
    assert len(drawn) == 3 and drawn[2] != drawn[0]
    (entry,) = json.loads((folder / "index.json").read_text())
    assert entry["pictures"] == ["000.ref0.png", "000.ref1.png"]
    assert all((folder / name).stat().st_size > 0 for name in entry["pictures"])
