from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kinodit.trainer import checkpoint
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import CheckpointError, TrainState

MESH = Mesh(torch.device("cpu"))


def save(folder: Path, step: int, keep_last: int = 0) -> Path:
    state = TrainState(step, num_samples=4 * step, num_tokens=9 * step, plan="p")
    tensors = {"model/w": torch.full((3,), float(step)), "ema/main/w": torch.zeros(2)}
    return checkpoint.save(folder, state, tensors, MESH, keep_last)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert checkpoint.load_state(path) == TrainState(7, 28, 63, "p")
    loaded = {"model/w": torch.zeros(3), "ema/main/w": torch.ones(2)}
    checkpoint.load(path, loaded, MESH)
    assert loaded["model/w"].tolist() == [7.0, 7.0, 7.0]
    assert loaded["ema/main/w"].tolist() == [0.0, 0.0]


def test_an_interrupted_save_is_not_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1)

    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.find_checkpoints(tmp_path) == [first]
    assert save(tmp_path, 2) in checkpoint.find_checkpoints(tmp_path)


def test_old_ones_are_removed_oldest_first(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step, keep_last=2)
    assert [checkpoint.step_of(p) for p in checkpoint.find_checkpoints(tmp_path)] == [2, 10]


def test_another_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another recipe"):
        checkpoint.load(path, {"model/other": torch.zeros(3)}, MESH)
    with pytest.raises(CheckpointError, match="another recipe"):
        checkpoint.load(path, {"model/w": torch.zeros(5)}, MESH)


@pytest.mark.parametrize("text", ["", "{", '{"format": 99}', '{"format": 1, "step": 3}', "[]"])
def test_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / checkpoint.STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.load_state(path)


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder has to be")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save(tmp_path, 1)
