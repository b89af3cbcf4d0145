"""A user's mistakes: a clear message, exit code 2, no traceback."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinodit.launch.cli import main
from tests.support.ranks import ROOT
from tests.support.recipes import tiny_recipe, write_clips, write_dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_dataset(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A dataset that a test may damage."""
    shutil.copytree(made / "data", tmp_path / "data")
    return tmp_path


def refused(capsys: Capture, *arguments: str) -> str:
    """Run the command; it must refuse, with one error on stderr. Returns what stderr says."""
    code = main(list(arguments))
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    return error


def recipe(root: Path, **sections: dict[str, object]) -> str:
    return str(tiny_recipe(root, root / "data", **sections))


def test_unknown_key_has_a_suggestion(root: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", recipe(root), "run.stepz=3")
    assert "stepz" in line and "Did you mean: 'steps'" in line


def test_wrong_type_names_key_and_value(root: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", recipe(root), "optim.lr=fast")
    assert "optim.lr" in line and "fast" in line


def test_unknown_choice_lists_the_others(root: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", recipe(root), "objective.name=recitfied_flow")
    assert "rectified_flow" in line


def test_missing_recipe(capsys: Capture, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(capsys, "train", str(tmp_path / "nowhere.yaml"))


def test_heads_that_do_not_divide(root: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", recipe(root), "model.num_heads=3")
    assert "32" in line and "3" in line and "num_heads" in line


def test_missing_shard(root: Path, capsys: Capture) -> None:
    path = recipe(root)
    (root / "data" / "000000.tar").unlink()
    assert "000000.tar" in refused(capsys, "train", path)


def test_truncated_shard(root: Path, capsys: Capture) -> None:
    shard = root / "data" / "000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    line = refused(capsys, "train", recipe(root))
    assert "000000.tar" in line and "byte" in line


def test_changed_bytes_in_a_shard(root: Path, capsys: Capture) -> None:
    shard = root / "data" / "000000.tar"
    data = bytearray(shard.read_bytes())
    for offset in range(1024, len(data), 4096):
        data[offset] ^= 0xFF
    shard.write_bytes(data)
    assert "000000.tar" in refused(capsys, "train", recipe(root))


def test_empty_selection(root: Path, capsys: Capture) -> None:
    where = "data.datasets.clips.where.height.min=4000"
    line = refused(capsys, "train", recipe(root), where)
    assert "12" in line and "height" in line


def test_no_dataset(tmp_path: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", str(tiny_recipe(tmp_path, tmp_path / "nothing")))
    assert "nothing" in line


def test_world_size_that_does_not_fit(root: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", recipe(root), "parallel.dp_shard=3")
    assert "3" in line and "1 process" in line


def test_unreadable_clip_when_packing(tmp_path: Path, capsys: Capture) -> None:
    write_clips(tmp_path / "clips", 2)
    (tmp_path / "clips" / "clip00.mp4").write_bytes(b"not a video at all")
    line = refused(capsys, "data", "pack", str(tmp_path / "clips"), str(tmp_path / "packed"))
    assert "clip00" in line
    assert not (tmp_path / "packed").exists()


def test_run_folder_of_another_recipe(root: Path, capsys: Capture) -> None:
    path = recipe(root)
    assert main(["train", path, "run.steps=1"]) == 0
    capsys.readouterr()
    line = refused(capsys, "train", path, "run.steps=1", "optim.lr=0.5")
    assert "optim.lr" in line and "0.5" in line and "run.name" in line


def test_missing_extra(root: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without_av(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av" or name.startswith("av."):
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *args, **kwargs)

    for module in [name for name in sys.modules if name == "av" or name.startswith("av.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_av)
    line = refused(capsys, "train", recipe(root), "data.workers=threads")
    assert "kinodit[media]" in line


def test_full_disk_when_writing_shards(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clips(tmp_path / "clips", 2)
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, "data", "pack", str(tmp_path / "clips"), str(tmp_path / "packed"))
    monkeypatch.setattr(os, "fsync", real)
    assert "No space left" in line or "full" in line
    assert not (tmp_path / "packed").exists()


def test_sampling_what_is_not_a_run(tmp_path: Path, capsys: Capture) -> None:
    assert "config.yaml" in refused(capsys, "sample", str(tmp_path), "--prompt", "x")


@pytest.mark.slow
def test_no_traceback_from_a_real_process(root: Path) -> None:
    path = recipe(root)
    done = subprocess.run(
        [sys.executable, "-m", "kinodit", "train", path, "run.stepz=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert io.StringIO(done.stderr).readline().startswith("error: ")
