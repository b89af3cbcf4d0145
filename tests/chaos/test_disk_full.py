"""A disk that is full in earnest: nothing that was saved is lost, and training goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kinodit.trainer.checkpoint import find_checkpoints, step_of, verify
from kinodit.trainer.checkpoint.commit import Party, Save
from kinodit.trainer.checkpoint.entries import num_bytes as num_bytes_of
from kinodit.trainer.jsonl import JsonLines, read_rows
from kinodit.trainer.state import CheckpointError, TrainState
from tests.support.disks import fill, small_disk
from tests.support.lives import Lives, Start

pytestmark = [pytest.mark.chaos, pytest.mark.gloo]

STEPS = 20
SECTIONS: dict[str, dict[str, object]] = {
    "run": {"steps": STEPS},
    "checkpoint": {"every_steps": 2, "keep_last": 1},
}
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24) as folder:
        yield folder


def save_of(run_dir: Path, step: int) -> Save:
    state = TrainState(step, 0, 0, "plan")
    return Save(run_dir, state, {}, 1, Party(0, 1, None), f"token{step}")


def test_a_disk_that_fills_up_within_a_save(disk: Path) -> None:
    tensors = {"model/w": torch.arange(MIB, dtype=torch.float32)}
    num_bytes = num_bytes_of(tensors)
    first, second, third = (save_of(disk, step) for step in (1, 2, 3))
    first.prepare(num_bytes)
    assert first.write(lambda: tensors) == []
    second.prepare(num_bytes)
    # It was there when it was asked for, and is gone before the tensors are written.
    ballast = fill(disk, spare_bytes=MIB)
    with pytest.raises(CheckpointError, match="disk full"):
        second.write(lambda: tensors)
    (left,) = find_checkpoints(disk)
    assert step_of(left) == 1 and verify(left) == []
    assert not second.temporary.exists()
    with pytest.raises(CheckpointError, match=r"disk full: need 5 MiB, have \d MiB"):
        third.prepare(num_bytes)
    ballast.unlink()
    third.prepare(num_bytes)
    assert third.write(lambda: tensors) == []
    (left,) = find_checkpoints(disk)
    assert step_of(left) == 3 and verify(left) == []


def test_lines_wait_for_room_and_none_is_cut(disk: Path) -> None:
    lines = JsonLines(disk / "m.jsonl")
    lines.append({"step": 0})
    ballast = fill(disk)
    for step in range(1, 40):
        lines.append({"step": step, "text": "x" * 1000})
    before = list(read_rows(disk / "m.jsonl"))
    assert None not in before and len(before) < 10
    ballast.unlink()
    lines.append({"step": 40})
    lines.close()
    assert [row["step"] for row in read_rows(disk / "m.jsonl") if row] == list(range(41))


def test_a_run_goes_on_and_says_so(recipe: Path, lives: Lives, disk: Path) -> None:
    full, free = recipe.parent / "full", recipe.parent / "free"

    def fill_and_free() -> None:
        for sign, action in ((full, lambda: fill(disk)), (free, (disk / "ballast").unlink)):
            while not sign.exists():
                time.sleep(0.02)
            action()

    watcher = threading.Thread(target=fill_and_free, daemon=True)
    watcher.start()
    # Rank 0 gives signs, and waits for them to be seen.
    faults = f"sleep:seconds=3,rank=0,step=5,once={full};sleep:seconds=3,rank=0,step=15,once={free}"
    end = lives.run(Start(recipe, (f"run.out_dir={disk}", "run.name=run"), faults))
    assert end.codes == [0, 0], end.logs
    quiet = lives.run(Start(recipe, ("run.name=quiet",)))
    assert quiet.codes == [0, 0], quiet.logs
    run = disk / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    undisturbed = (recipe.parent / "quiet" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [json.loads(line)["loss"] for line in undisturbed]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    said = [row["message"] for row in events if row["event"] == "warning"]
    assert [words for words in said if "disk full: need" in words]
    assert [words for words in said if "training goes on with the checkpoints that are" in words]
    (last,) = find_checkpoints(run)
    assert step_of(last) == STEPS and verify(last) == []
