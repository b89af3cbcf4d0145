"""Waiting for samples is told from waiting for ranks, on whichever rank it happens."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kinodit.data.loader import Loader
from kinodit.trainer import faults
from kinodit.trainer.config import load_config
from kinodit.trainer.jsonl import read_rows
from kinodit.trainer.loop import _with_data_of_slowest
from kinodit.trainer.metrics import Clock
from kinodit.trainer.resilience.goodput import read_goodput
from kinodit.trainer.run import train
from kinodit.trainer.topology import Topology
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset

STEPS = 5
SLOW_S = 0.4


def run_case(rank: int, world_size: int, start: tuple[Path, str]) -> None:
    """Rank 1 is late in every step: for samples, or between two steps, for itself."""
    recipe, late_for = start
    config = load_config(recipe, [f"run.name={late_for}"])
    load, reach = Loader.__next__, faults.reach

    def slow_load(loader: Loader) -> Any:
        if rank == 1 and late_for == "samples":
            time.sleep(SLOW_S)
        return load(loader)

    def slow_reach(point: str, *rest: Any) -> None:
        if rank == 1 and late_for == "itself" and point == "step:begin":
            time.sleep(SLOW_S)
        reach(point, *rest)

    with patch.object(Loader, "__next__", slow_load), patch.object(faults, "reach", slow_reach):
        train(config, Topology(rank, world_size, rank), torch.device("cpu"), io.StringIO())


@pytest.mark.gloo
@pytest.mark.parametrize("late_for", ["samples", "itself"])
def test_data_wait_is_that_of_the_rank_that_waits_for_samples(
    late_for: str, tmp_path: Path, two: Ranks
) -> None:
    root = tmp_path / "runs"
    sections: dict[str, Any] = {
        "run": {"steps": STEPS, "out_dir": str(root)},
        "log": {"every_steps": 1},
    }
    recipe = tiny_recipe(tmp_path, write_dataset(tmp_path), **sections)
    two.run(run_case, (recipe, late_for))
    found = read_rows(root / late_for / "metrics.jsonl")
    rows = [row for row in found if row is not None and row["kind"] == "train"]
    goodput = read_goodput(root / late_for)
    assert len(rows) == STEPS and goodput is not None
    told_s = sum(row["data_wait_s"] for row in rows)
    late_s = STEPS * SLOW_S
    if late_for == "samples":
        # Rank 0, whose ledger it is, had its own samples at once.
        assert told_s > late_s and goodput.data_wait_s > late_s
    else:
        assert told_s < late_s / 2 and goodput.data_wait_s < late_s / 2
        assert goodput.productive_s > late_s


def test_what_others_wait_for_samples_is_no_computing() -> None:
    row: dict[str, object] = {"data_wait_s": 0.5}
    ours = {"data": 0.4, "compute": 3.0, "encode": 1.0}
    assert _with_data_of_slowest(ours, row, 2) == {"data": 1.0, "compute": 2.4, "encode": 1.0}
    assert _with_data_of_slowest({"compute": 0.25}, row, 2) == {"data": 0.25, "compute": 0.0}
    assert _with_data_of_slowest({**ours, "data": 1.5}, row, 2) == {**ours, "data": 1.5}


def test_time_is_moved_and_not_made() -> None:
    clock = Clock({"data": 3.0})
    clock.move(2.0, "data", "compute")
    assert clock.take() == {"data": 1.0, "compute": 2.0}
