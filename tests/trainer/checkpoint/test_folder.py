"""What counts as a checkpoint, what is cleared up, and what may never be removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinodit.trainer.checkpoint import find_checkpoints, recover, step_of, verify
from kinodit.trainer.checkpoint import folder as disk
from tests.support.checkpoints import save


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in find_checkpoints(run_dir)]


def test_old_ones_are_removed_oldest_first(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, keep_last=2)
    assert steps(tmp_path) == [2, 10]
    save(tmp_path, 11)
    assert steps(tmp_path) == [2, 10, 11]


def test_latest_is_a_hint(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    latest = tmp_path / "checkpoints" / "latest"
    assert latest.read_text() == "step-00000002\n"
    latest.write_text("step-00000001\n")
    assert steps(tmp_path) == [1, 2]
    latest.unlink()
    assert steps(tmp_path) == [1, 2] and disk.read_latest(tmp_path) == ""


def test_only_folders_of_the_exact_name_with_a_manifest_count(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in ("step-1", "step-00000002.tmp-a", "step-x", "old-step-00000003"):
        (path.parent / name).mkdir()
    (path.parent / "step-00000004").mkdir()
    (path.parent / "step-00000005").write_text("a file")
    assert steps(tmp_path) == [1]


def test_what_an_interrupted_save_left_is_set_aside_and_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    partial = path.with_name("step-00000002.tmp-abc")
    partial.mkdir()
    (partial / "__0_0.distcp").write_text("half")
    hint = path.with_name("latest.tmp-abc")
    hint.write_text("step-0")
    (said,) = recover(tmp_path)
    assert "step-00000002.tmp-abc is not a complete checkpoint" in said
    assert (path.parent / "quarantine" / partial.name / "__0_0.distcp").exists()
    assert not partial.exists() and not hint.exists()
    assert steps(tmp_path) == [1] and recover(tmp_path) == []


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    path.rename(path.with_name(f"{path.name}.old-abc"))
    assert steps(tmp_path) == []
    (said,) = recover(tmp_path)
    assert "step-00000001 was about to be replaced: it is back" in said
    assert verify(path) == []


def test_a_removal_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    old = path.with_name(f"{path.name}.old-abc")
    path.rename(old)
    (old / "manifest.json").unlink()
    assert recover(tmp_path) == []
    assert not old.exists() and not path.exists()


def test_partial_leftovers_do_not_fill_the_disk(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for number in range(5):
        path.with_name(f"step-00000002.tmp-{number}").mkdir()
        recover(tmp_path)
    left = sorted(item.name for item in (path.parent / "quarantine").iterdir())
    assert left == ["step-00000002.tmp-3", "step-00000002.tmp-4"]


def test_what_once_was_whole_stays_in_quarantine(tmp_path: Path) -> None:
    for step in range(1, 5):
        disk.quarantine(save(tmp_path, step))
    disk.quarantine(save(tmp_path, 4))
    assert len(list((tmp_path / "checkpoints" / "quarantine").iterdir())) == 5


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_broken_one_pushes_no_good_one_out(tmp_path: Path, keep_last: int) -> None:
    save(tmp_path, 1, 2)
    broken = save(tmp_path, 3)
    (broken / "__0_0.distcp").unlink()
    removed = [step_of(path) for path in disk.prunable(tmp_path, keep_last)]
    assert removed == [[1], []][keep_last - 1]


def test_the_last_good_one_and_the_hinted_one_are_never_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert disk.prunable(tmp_path, 0) == []
    save(tmp_path, 2, 3)
    disk.write_latest(path)
    assert [step_of(p) for p in disk.prunable(tmp_path, 0)] == [2]
    for found in find_checkpoints(tmp_path):
        (found / "state.json").unlink()
    assert disk.prunable(tmp_path, 0) == []


def test_a_removal_that_failed_half_way_is_made_good_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)

    def refused() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        disk.discard(disk.path_of(tmp_path, 1), refused)
    (leftover,) = disk.prunable(tmp_path, 1)
    assert leftover.name.startswith("step-00000001.old-")
    # Of a step that is not older than what is kept it may be the only copy.
    (leftover.parent / "step-00000002.old-x").mkdir()
    assert disk.prunable(tmp_path, 1) == [leftover]
    disk.discard(leftover)
    assert not leftover.exists() and steps(tmp_path) == [2]


def test_steps_that_are_taken_again_replace_their_checkpoint(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    written = (first / "manifest.json").stat().st_ino
    again = save(tmp_path, 1)
    assert again == first and (again / "manifest.json").stat().st_ino != written
    assert {item.name for item in first.parent.iterdir()} == {first.name, "latest"}
