"""What was saved is what is loaded, or it is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kinodit.trainer import checkpoint
from kinodit.trainer.checkpoint import (
    BrokenCheckpoint,
    find_checkpoints,
    manifest,
    restore,
    verify,
)
from kinodit.trainer.state import CheckpointError, TrainState
from tests.support.checkpoints import FACTS, MESH, empty, save, state_at, tensors_at

KINDS = (".metadata", "__0_0.distcp", "manifest.json", "state.json")


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 1 and one of step 2."""
    root = tmp_path_factory.mktemp("good")
    save(root, 1, 2)
    return root


def copied(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_round_trip(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path, 7, mode=mode)
    assert checkpoint.load_state(path) == TrainState(7, 28, 63, "p")
    loaded = empty()
    checkpoint.load(path, loaded, MESH)
    assert all(torch.equal(loaded[name], value) for name, value in tensors_at(7).items())
    assert verify(path) == []
    found = checkpoint.read_manifest(path)
    assert set(found.files) == set(KINDS) - {"manifest.json"}
    assert found.step == 7 and found.facts == FACTS


def test_every_kind_of_file_is_there(good: Path) -> None:
    for path in find_checkpoints(good):
        assert {file.name for file in path.iterdir()} == set(KINDS)


def damages(size: int) -> list[tuple[str, int]]:
    """Every kind of damage, at several places of a file of `size` bytes."""
    places = sorted({0, 1, size // 3, size // 2, size - 2, size - 1})
    cuts = [("cut", length) for length in (0, size // 2, size - 1)]
    return [("flip", offset) for offset in places] + cuts + [("grow", size), ("lose", 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_found_and_named(kind: str, good: Path, tmp_path: Path) -> None:
    run = copied(good, tmp_path)
    path = find_checkpoints(run)[-1]
    whole = (path / kind).read_bytes()
    missed = []
    for how, where in damages(len(whole)):
        if how == "flip":
            flip(path / kind, where)
        elif how == "lose":
            (path / kind).unlink()
        else:
            (path / kind).write_bytes(whole[:where] if how == "cut" else whole + b"\n")
        found = verify(path)
        if len(found) != 1 or f"step-00000002/{kind}: " not in found[0]:
            missed.append((how, where, found))
        with pytest.raises(BrokenCheckpoint, match=kind.replace(".", r"\.")):
            checkpoint.load(path, empty(), MESH)
        (path / kind).write_bytes(whole)
    assert not missed
    assert verify(path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_one_before_is_used_and_the_loss_is_told(kind: str, good: Path, tmp_path: Path) -> None:
    run = copied(good, tmp_path)
    (older, newer) = find_checkpoints(run)
    flip(newer / kind, 40)
    loaded = empty()
    restored = restore(run, loaded, MESH)
    assert restored is not None and restored.path == older
    assert restored.state == state_at(1)
    assert torch.equal(loaded["ema/main/w"], tensors_at(1)["ema/main/w"])
    said, moved = restored.broken
    assert f"step-00000002/{kind}: " in said
    assert said.endswith("going back to step-00000001, 1 steps are lost")
    assert kind == ".metadata" or "expected" in said or "damaged" in said
    assert find_checkpoints(run) == [older]
    assert (run / "checkpoints" / "quarantine" / newer.name / kind).exists()
    assert "quarantine" in moved


def test_strict_goes_back_to_nothing(good: Path, tmp_path: Path) -> None:
    run = copied(good, tmp_path)
    flip(find_checkpoints(run)[-1] / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match=r"checkpoint\.strict=true.*__0_0\.distcp"):
        restore(run, empty(), MESH, strict=True)
    assert len(find_checkpoints(run)) == 2


def test_a_run_does_not_start_over_because_all_is_broken(good: Path, tmp_path: Path) -> None:
    run = copied(good, tmp_path)
    for path in find_checkpoints(run):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is broken"):
        restore(run, empty(), MESH)
    assert len(find_checkpoints(run)) == 2
    assert restore(tmp_path / "nothing", empty(), MESH) is None


def test_another_format_is_not_taken_for_damage(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(good, tmp_path)
    monkeypatch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
    with pytest.raises(CheckpointError, match="not damaged; go on with the version") as caught:
        restore(run, empty(), MESH)
    assert not isinstance(caught.value, BrokenCheckpoint)
    assert len(find_checkpoints(run)) == 2
    assert "not damaged" in verify(find_checkpoints(run)[-1])[0]


def test_a_folder_under_another_name_is_no_checkpoint_of_that_step(
    good: Path, tmp_path: Path
) -> None:
    run = copied(good, tmp_path)
    path = find_checkpoints(run)[-1]
    path.rename(path.with_name("step-00000009"))
    restored = restore(run, empty(), MESH)
    assert restored is not None and restored.state.step == 1
    assert "expected step 00000009, found step 2" in restored.broken[0]


def test_another_model_is_refused_with_the_reason(good: Path, tmp_path: Path) -> None:
    run = copied(good, tmp_path)
    for other in ({"model/other": torch.zeros(3)}, {"model/w": torch.zeros(5)}):
        with pytest.raises(CheckpointError, match="another recipe") as caught:
            restore(run, other, MESH)
        assert not isinstance(caught.value, BrokenCheckpoint)
    assert len(find_checkpoints(run)) == 2


def test_refused_by_whoever_is_asked(good: Path) -> None:
    def accept(*given: object) -> TrainState:
        raise CheckpointError("not this one")

    loaded = empty()
    with pytest.raises(CheckpointError, match="not this one"):
        restore(good, loaded, MESH, accept=accept)
    assert not loaded["ema/main/w"].any()
