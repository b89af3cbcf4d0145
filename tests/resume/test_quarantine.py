"""A run on damaged data: the same curve on any ranks, after any restart, with every fault named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kinodit.data.container import DecodeError
from kinodit.data.decode import decode
from kinodit.data.manifest import Dataset
from kinodit.data.quarantine import LEDGER_FILE, QuarantineError
from kinodit.data.samples import LoadError
from kinodit.trainer.config import load_config
from kinodit.trainer.quarantine import read_ledger
from kinodit.trainer.run import train
from kinodit.trainer.topology import Topology
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

STEPS = 6
BAD = (2, 7)
Start = tuple[Path, str, tuple[str, ...]]


def run_case(rank: int, world_size: int, start: Start) -> None:
    recipe, name, overrides = start
    config = load_config(recipe, [f"run.name={name}", *overrides])
    train(config, Topology(rank, world_size, rank), torch.device("cpu"), io.StringIO())


def run_with_a_slow_rank(rank: int, world_size: int, start: Start) -> None:
    """Sample 5 is too slow on rank 1, and on no other; the ranks are on two nodes."""

    def slow(record: Any, *rest: Any) -> Any:
        if rank == 1 and record.key == "clip05":
            raise DecodeError("sample 'clip05': too slow", record.key)
        return decode(record, *rest)

    apart = patch("kinodit.trainer.quarantine._shared", return_value=None)
    with apart, patch("kinodit.data.decoders.decode", slow):
        run_case(rank, world_size, start)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 12 clips of which two were damaged after they were indexed."""
    root = tmp_path_factory.mktemp("quarantine")
    made = write_dataset(root)
    dataset = Dataset(made)
    for index in BAD:
        path, offset, _ = dataset.locate(index)
        data = bytearray(path.read_bytes())
        data[offset + 900] ^= 4
        path.write_bytes(data)
    return tiny_recipe(
        root,
        made,
        run={"steps": STEPS, "out_dir": str(root / "runs")},
        eval={"every_steps": 3, "num_samples": 5},
    )


ALLOWED = ("data.quarantine.max_shard_share=1", "data.quarantine.max_step_share=1")


def losses(recipe: Path, name: str) -> list[tuple[int, float]]:
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def ledger(recipe: Path, name: str) -> list[dict[str, Any]]:
    lines = (recipe.parent / "runs" / name / LEDGER_FILE).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda row: (row["plan"], row["step"], row["slot"]))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> str:
    run_case(0, 1, (recipe, "whole", ALLOWED))
    return "whole"


def test_every_bad_sample_is_in_the_ledger_and_in_the_log(recipe: Path, whole: str) -> None:
    assert len(losses(recipe, whole)) == STEPS
    rows = ledger(recipe, whole)
    assert {row["wanted"] for row in rows} == set(BAD)
    assert all(row["used"] not in BAD and "CRC-32" in row["faults"][0]["reason"] for row in rows)
    assert {row["faults"][0]["key"] for row in rows} == {"clip02", "clip07"}
    # Training and validation have plans of their own, and lines of both.
    assert len({row["plan"] for row in rows}) == 2
    events = (recipe.parent / "runs" / whole / "events.jsonl").read_text().splitlines()
    told = [row for row in map(json.loads, events) if row["event"] == "quarantine"]
    assert told and all("was replaced by clips:" in row["message"] for row in told)


@pytest.mark.gloo
def test_two_ranks_and_restarts_give_the_same_curve(recipe: Path, whole: str, two: Ranks) -> None:
    for stop in (2, 0):
        two.run(run_case, (recipe, "cut", (*ALLOWED, f"run.stop_after_steps={stop}")))
    expected = losses(recipe, whole)
    assert [step for step, _ in losses(recipe, "cut")] == [step for step, _ in expected]
    for (_, ours), (_, theirs) in zip(losses(recipe, "cut"), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert ledger(recipe, "cut") == ledger(recipe, whole)


@pytest.mark.gloo
@pytest.mark.parametrize("axis", quick(["tp", "cp"]))
def test_ranks_that_share_a_pack_train_on_one_sample(recipe: Path, two: Ranks, axis: str) -> None:
    """Sample 5 fails on one of two ranks with the same packs: both take its substitute."""
    layout = (*ALLOWED, f"parallel.{axis}=2", "data.workers=threads")
    two.run(run_with_a_slow_rank, (recipe, f"slow-{axis}", layout))
    rows = ledger(recipe, f"slow-{axis}")
    assert {row["wanted"] for row in rows} == {*BAD, 5}
    # A rerun in which nothing is slow follows the ledger, line by line.
    run = recipe.parent / "runs" / f"again-{axis}"
    run.mkdir(parents=True)
    shutil.copy(recipe.parent / "runs" / f"slow-{axis}" / LEDGER_FILE, run / LEDGER_FILE)
    two.run(run_case, (recipe, f"again-{axis}", layout))
    assert losses(recipe, f"again-{axis}") == losses(recipe, f"slow-{axis}")
    assert ledger(recipe, f"again-{axis}") == rows


@pytest.mark.gloo
def test_quotas_end_the_run_on_all_ranks(recipe: Path, two: Ranks) -> None:
    strict = ("data.quarantine.max_step_share=0", "data.quarantine.max_shard_share=0")
    with pytest.raises(Exception, match=r"max_(step|shard)_share allows 0"):
        two.run(run_case, (recipe, "strict", (*strict, "data.samples_per_step=12")))


def test_fail_names_the_sample(recipe: Path) -> None:
    with pytest.raises(LoadError, match=r"CRC-32.*step \d, slot \d"):
        run_case(0, 1, (recipe, "fail", ("data.on_error=fail",)))


def damaged(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_a_damaged_ledger_is_refused_but_for_a_line_that_a_kill_cut_short(
    recipe: Path, whole: str, tmp_path: Path
) -> None:
    path = tmp_path / LEDGER_FILE
    shutil.copy(recipe.parent / "runs" / whole / LEDGER_FILE, path)
    plan = json.loads(path.read_text().splitlines()[-1])["plan"]
    before = read_ledger(tmp_path, plan)
    assert before
    damaged(path, lambda text: text + '{"plan": "' + plan)
    assert read_ledger(tmp_path, plan) == before
    damaged(path, lambda text: "{\n" + text)
    with pytest.raises(QuarantineError, match="damaged"):
        read_ledger(tmp_path, plan)
