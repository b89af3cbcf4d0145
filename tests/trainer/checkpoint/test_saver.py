"""Saves beside training: one at a time, of the state as it was, and failures are told."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kinodit.trainer import checkpoint, faults
from kinodit.trainer.checkpoint import CheckpointConfig, Saver, find_checkpoints, step_of
from kinodit.trainer.faults import Fault
from kinodit.trainer.state import CheckpointError
from tests.support.checkpoints import FACTS, MESH, empty, save, state_at, tensors_at


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    made = Saver(tmp_path, CheckpointConfig(keep_last=0), MESH, FACTS)
    yield made
    made.close()


def test_what_is_saved_is_the_state_at_the_save(saver: Saver, tmp_path: Path) -> None:
    faults.arm([Fault("sleep", point="checkpoint:before-shards", seconds=0.2)])
    tensors = tensors_at(3)
    assert saver.save(state_at(3), tensors) == []
    saver.wait_for_copy()
    for tensor in tensors.values():
        tensor.fill_(-1)  # the optimizer's next step
    (outcome,) = saver.drain()
    loaded = empty()
    checkpoint.load(outcome.path, loaded, MESH)
    assert all(torch.equal(loaded[name], value) for name, value in tensors_at(3).items())


def test_the_copy_is_waited_for(saver: Saver) -> None:
    faults.arm([Fault("sleep", point="checkpoint:before-copy", seconds=0.3)])
    saver.save(state_at(1), tensors_at(1))
    assert saver.stall_s < 0.15
    saver.wait_for_copy()
    assert saver.stall_s > 0.25
    saver.wait_for_copy()
    assert saver.drain()[0].failure == ""


def test_at_most_one_is_in_flight(saver: Saver, tmp_path: Path) -> None:
    faults.arm([Fault("sleep", point="checkpoint:before-shards", seconds=0.2, step=1)])
    assert saver.save(state_at(1), tensors_at(1)) == []
    assert saver.poll() == []
    (first,) = saver.save(state_at(2), tensors_at(2))
    assert first.step == 1 and find_checkpoints(tmp_path) == [first.path]
    assert [outcome.step for outcome in saver.drain()] == [2]
    assert saver.drain() == [] and saver.poll() == []


def test_leaving_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    faults.arm([Fault("sleep", point="checkpoint:after-shards", seconds=0.2)])
    saver = Saver(tmp_path, CheckpointConfig(), MESH, FACTS)
    saver.save(state_at(1), tensors_at(1))
    saver.close()
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [1]


POINTS = [p for p in faults.POINTS if p.startswith("checkpoint:")]
BEFORE_RENAME = POINTS[: POINTS.index("checkpoint:after-rename")]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_leaves_what_was_there(point: str, mode: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    saver = Saver(tmp_path, CheckpointConfig(keep_last=2, mode=mode), MESH, FACTS)  # type: ignore[arg-type]
    faults.arm([Fault("enospc", point=point)])
    (outcome,) = saver.save(state_at(3), tensors_at(3)) + saver.drain()
    reached = mode == "async" or point.partition("-")[2] != "copy"
    failed = reached and point in BEFORE_RENAME
    assert bool(outcome.failure) == failed and saver.num_failed == failed
    if failed:
        assert "disk full" in outcome.failure and "step-00000003" in outcome.failure
    elif reached:
        assert "disk full" in outcome.notes[0]
    kept = [step_of(path) for path in find_checkpoints(tmp_path)]
    assert all(checkpoint.verify(path) == [] for path in find_checkpoints(tmp_path))
    assert kept[-1] == (2 if failed else 3) and 2 in kept
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))
    (outcome,) = saver.save(state_at(4), tensors_at(4)) + saver.drain()
    assert not outcome.failure
    saver.close()
    checkpoint.recover(tmp_path)
    assert find_checkpoints(tmp_path)[-1] == outcome.path


def test_the_failure_of_a_save_is_known_at_the_next_poll(saver: Saver, tmp_path: Path) -> None:
    faults.arm([Fault("enospc", point="checkpoint:inside-shard")])
    saver.save(state_at(1), tensors_at(1))
    assert saver._future is not None
    saver._future.exception()
    (outcome,) = saver.poll()
    assert "disk full" in outcome.failure and saver.last == outcome
    assert find_checkpoints(tmp_path) == []


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_may_rather_stop(mode: str, tmp_path: Path) -> None:
    config = CheckpointConfig(mode=mode, on_failure="stop")  # type: ignore[arg-type]
    saver = Saver(tmp_path, config, MESH, FACTS)
    faults.arm([Fault("enospc", point="checkpoint:before-manifest")])
    with pytest.raises(CheckpointError, match="disk full"):
        saver.save(state_at(1), tensors_at(1))
        saver.drain()
    saver.close()


def test_a_defect_is_not_taken_for_a_full_disk(saver: Saver) -> None:
    faults.arm([Fault("raise", point="checkpoint:after-shards")])
    saver.save(state_at(1), tensors_at(1))
    with pytest.raises(faults.InjectedFault):
        saver.drain()


def test_what_does_not_fit_is_not_begun(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(f_bavail=100, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: small)
    (outcome,) = saver.save(state_at(1), {"w": torch.zeros(1 << 20)})
    assert "disk full: need 5 MiB, have 0 MiB" in outcome.failure
    assert "checkpoint.keep_last" in outcome.failure
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder has to be")
    saver = Saver(tmp_path, CheckpointConfig(), MESH, FACTS)
    (outcome,) = saver.save(state_at(1), tensors_at(1))
    assert "cannot write checkpoint" in outcome.failure
    saver.close()


def test_old_ones_stay_if_the_new_one_reads_back_wrong(tmp_path: Path) -> None:
    save(tmp_path, 1)
    written = threading.Event()
    faults.arm([Fault("sleep", point="checkpoint:before-latest", seconds=1.0)])
    saver = Saver(tmp_path, CheckpointConfig(keep_last=1), MESH, FACTS)
    saver.save(state_at(2), tensors_at(2))
    shard = tmp_path / "checkpoints" / "step-00000002" / "__0_0.distcp"
    while not shard.exists():
        written.wait(0.01)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    (outcome,) = saver.drain()
    saver.close()
    assert "the new one is broken" in outcome.notes[0]
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [1, 2]


def test_a_disk_that_fills_up_in_the_middle_is_told_as_such(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    saver.save(state_at(1), tensors_at(1))
    (outcome,) = saver.drain()
    assert "No space left on device" in outcome.failure
