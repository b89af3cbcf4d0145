"""Every command that may take long tells how far it is, how fast, and what time is left."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kinodit.data.pack import pack
from kinodit.launch.cli import main
from kinodit.launch.progress_line import ProgressLine, StageLines
from kinodit.trainer.motion import MotionResult
from tests.support.recipes import tiny_recipe, write_clips

Shown = list[tuple[ProgressLine, int, int]]

COMMANDS: dict[str, tuple[list[str], str]] = {
    "data pack": (["data", "pack", "{root}/clips", "{tmp}/packed"], "files"),
    "data demo": (
        ["data", "demo", "{tmp}/demo", "--num-clips", "1", "--num-images", "2", "--num-sounds", "0",
         "--no-real-clips", "--size", "32", "--workers", "1"],
        "samples",
    ),
    "data index": (["data", "index", "{tmp}/bare"], "MiB"),
    "data export-energon": (["data", "export-energon", "{tmp}/data"], "samples"),
    "data validate": (["data", "validate", "{root}/data", "--decode"], "samples"),
    "data encode": (["data", "encode", "{root}/recipe.yaml", "{tmp}/encoded"], "samples"),
    "data curate": (["data", "curate", "{root}/data", "{tmp}/scored", "--text", "no"], "samples"),
    "data preview": (["data", "preview", "{root}/data", "--out", "{tmp}/page.html"], "samples"),
    "data plan": (["data", "plan", "{root}/recipe.yaml"], "steps"),
    "data verify-ledger": (["data", "verify-ledger", "{root}/runs/tiny"], "steps"),
    "evaluate": (["evaluate", "{root}/runs/tiny", "--samples", "2"], "done"),
    "sample": (["sample", "{root}/runs/tiny", "--prompt", "a", "--out", "{tmp}/drawn"], "steps"),
    "measure": (["measure", "{root}/runs/tiny"], "done"),
    "certify": (["certify", "{root}/recipe.yaml"], "layouts"),
    "checkpoint verify": (["checkpoint", "verify", "{root}/runs/tiny"], "MiB"),
    "checkpoint prune": (
        ["checkpoint", "prune", "{root}/runs/tiny", "--keep-last", "1", "--dry-run"],
        "checkpoints",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("long")
    write_clips(made / "clips", 6)
    pack(made / "clips", made / "data")
    recipe = tiny_recipe(
        made,
        made / "data",
        run={"steps": 2, "name": "tiny", "out_dir": str(made / "runs")},
        eval={"num_samples": 2, "every_steps": 0},
        checkpoint={"every_steps": 1},
        sample={"sampler": {"steps": 3}},
    )
    assert main(["train", str(recipe), "--ledger"]) == 0
    return made


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What lines were asked to show; without this, that a line is cleared."""
    calls: Shown = []

    def show(line: ProgressLine, done: int, total: int, note: str) -> None:
        calls.append((line, done, total))
        line._shown = True

    monkeypatch.setattr(ProgressLine, "show", show)
    return calls


def copy(source: Path, target: Path, suffixes: Sequence[str]) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in suffixes:
            (target / path.name).write_bytes(path.read_bytes())


def without_what_takes_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(ok=True)
    monkeypatch.setattr(
        "kinodit.trainer.certify.run.certify", lambda small, cases, device: [row for _ in cases]
    )
    monkeypatch.setattr("kinodit.launch.commands.certify._print_row", lambda *_: None)
    certificate = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(
        "kinodit.trainer.certify.certificate.Certificate.of", lambda *_: certificate
    )
    prompts = ["a square moves left", "a square moves up"]
    monkeypatch.setattr("kinodit.trainer.motion.motion_prompts", lambda *_: prompts)
    monkeypatch.setattr(
        "kinodit.trainer.motion.measure_gallery", lambda folder: MotionResult(2, 1, {"left": {}})
    )


SLOW = ("data demo", "data encode", "evaluate", "sample", "measure")
"""Commands that draw or make clips: each takes a second or two."""


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS],
)
def test_a_long_command_shows_how_far_it_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown, command: str
) -> None:
    copy(root / "data", tmp_path / "data", [".tar", ".idx", ".json"])
    copy(root / "data", tmp_path / "bare", [".tar"])
    without_what_takes_minutes(monkeypatch)
    words, unit = COMMANDS[command]
    assert main([word.format(root=root, tmp=tmp_path) for word in words]) == 0
    assert shown and {line._unit for line, *_ in shown} == {unit}
    lines = list(dict.fromkeys(line for line, *_ in shown))
    for line in lines:
        counts = [(done, total) for other, done, total in shown if other is line]
        done = [count for count, _ in counts]
        assert done == sorted(done) and len({total for _, total in counts}) == 1
        # The last checkpoint is told of in a line that stays.
        last = counts[-1][1] - (command == "checkpoint prune")
        assert done[-1] == last, "it comes to its end"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stages_have_a_pace_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    fake: Any = SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr("kinodit.launch.progress_line.time", fake)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines = StageLines("done")
    for stage, done, total in (("one", 4, 10), ("one", 5, 10), ("two", 0, 4), ("two", 1, 4)):
        lines.show(stage, done, total)
        seconds[0] += 2.0 if stage == "one" else 60.0
    lines.end()
    _, first, _, second, last = terminal.getvalue().split("\r\x1b[K")
    assert first.endswith("5/10 done  0.5 done/s  one  10 s left")
    assert second.endswith("1/4 done  60 s/done  two  3 min 00 s left")
    assert last == ""
    silent = Terminal()
    monkeypatch.setattr(sys, "stderr", silent)
    monkeypatch.setattr("kinodit.launch.progress_line.time", SimpleNamespace(monotonic=lambda: 0))
    StageLines("done", is_shown=False).show("one", 5, 10)
    assert silent.getvalue() == ""
