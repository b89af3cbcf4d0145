"""Killed a hundred times, on other ranks and workers each time: the same batches, none lost.

A *start* is a process that gives all ranks of some data-parallel size their packs, by a loader each
as the trainer makes them, and keeps the trainer's own ledger and state. It is killed by SIGKILL
wherever it happens to be.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kinodit.trainer.verify_consumed import verify
from tests.data.clips import small_records, write_dataset
from tests.support.evidence import write_evidence
from tests.support.simulated import DIGESTS, STATE, Life, live, opened

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

THIS = "tests/chaos/test_consumed.py"
DP_SIZES, WORKERS = (1, 2, 3, 4, 8), (0, 1, 2, 4)
PRELOADED = ["kinodit.data.decode", "kinodit.trainer.consumed", "kinodit.data.loader", "av"]


def digests_in(run: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for line in (run / DIGESTS).read_text().splitlines():
        if line.endswith("]"):
            step, value = json.loads(line)
            found.setdefault(step, set()).add(value)
    return found


@pytest.mark.parametrize("packing", ["count", "budget"])
def test_kills_lose_no_sample_and_change_no_batch(packing: str, tmp_path: Path, size: str) -> None:
    cycles = 100 if size == "full" else 6
    steps = 3 * cycles
    source = write_dataset(tmp_path / "data", small_records(53))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        run.mkdir()
    live(Life(str(source.directory), str(whole), 1, 1, packing, steps))
    draw = random.Random(5)
    kills = starts = 0
    sizes, workers = set(), set()
    while not (cut / STATE).is_file() or json.loads((cut / STATE).read_text())["step"] < steps:
        life = Life(
            str(source.directory), str(cut), draw.choice(DP_SIZES), draw.choice(WORKERS), packing,
            steps,
        )  # fmt: skip
        starts += 1
        assert starts < 4 * cycles
        sizes.add(life.dp_size)
        workers.add(life.workers)
        process = context.Process(target=live, args=(life,))
        process.start()
        if kills < cycles:
            wait_for_steps(cut, draw.randint(0, 3), process)
            time.sleep(draw.random() * 0.02)
            assert process.pid is not None
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
    expected = digests_in(whole)
    assert digests_in(cut) == expected and len(expected) == steps
    assert all(len(values) == 1 for values in expected.values())
    verdict = verify(cut, opened(life)[0])
    assert (verdict.lost, verdict.duplicated, verdict.unplanned) == (0, 0, 0), verdict.faults
    assert verdict.is_exact and verdict.num_steps == steps
    assert verdict.num_samples == 12 * steps
    assert kills >= min(cycles, 5)
    if size == "full":
        assert kills >= cycles and sizes == set(DP_SIZES) and workers == set(WORKERS)
        figures = {
            "command": f"pytest -m chaos --size full {THIS}", "kills": kills, "lives": starts,
            "dp_sizes": sorted(sizes), "workers": sorted(workers), "steps": steps,
            "samples": verdict.num_samples, "lost": 0, "duplicated": 0,
            "rows_done_again": verdict.redone, "batches_are_identical": True,
        }  # fmt: skip
        write_evidence(f"consumed_{packing}", THIS, figures)


def wait_for_steps(run: Path, count: int, process: Any) -> None:
    """Until the run has `count` more steps, or its process is over."""
    path = run / DIGESTS
    start = path.stat().st_size if path.is_file() else 0
    while process.is_alive():
        grown = path.stat().st_size - start if path.is_file() else 0
        if grown >= 75 * count:
            return
        time.sleep(0.002)
