"""The ledger of a real run that was interrupted on several numbers of ranks is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.launch.cli import main
from kinodit.trainer.consumed import FOLDER
from tests.resume.test_resume import STEPS, Start, run_case
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

pytestmark = pytest.mark.gloo


def test_a_run_on_one_three_and_two_ranks_is_proved_exact(
    tmp_path: Path, groups: dict[int, Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    run: dict[str, object] = {"steps": STEPS, "out_dir": str(tmp_path / "runs")}
    recipe = tiny_recipe(tmp_path, write_dataset(tmp_path), run=run)
    folder = tmp_path / "runs" / "led"
    ledger = ("log.ledger=true",)
    run_case(0, 1, Start(recipe, "led", 2, overrides=ledger))
    groups[3].run(run_case, Start(recipe, "led", 1, overrides=ledger))
    groups[2].run(run_case, Start(recipe, "led", overrides=(*ledger, "parallel.cp=2")))
    capsys.readouterr()
    assert main(["data", "verify-ledger", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"{STEPS} steps in 3 lives, 36 samples: 0 lost, 0 duplicated, 0 unplanned" in said

    rows = (folder / FOLDER / "0000.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    last["samples"][0][3:] = last["samples"][1][3:]
    (folder / FOLDER / "0000.jsonl").write_text("\n".join([*rows[:-1], json.dumps(last)]) + "\n")
    assert main(["data", "verify-ledger", str(folder), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["lost"] == 1 and not verdict["is_exact"]
