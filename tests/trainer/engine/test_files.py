"""Optimizer state in files: the numbers as in memory, in less of it, and nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinodit.models.errors import ConfigError
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import RunConfig, load_config
from kinodit.trainer.engine.config import DeepSpeedConfig
from tests.support.ranks import ROOT, Groups, Ranks
from tests.trainer.engine.test_zero import backward, engine_of, whole

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"
)
ON_DISK_2 = DeepSpeedConfig(stage=2, offload_optimizer="nvme")
ON_DISK = DeepSpeedConfig(stage=3, offload_optimizer="nvme", offload_params="nvme")


@needs_deepspeed
def test_a_tensor_in_a_file_is_like_any_other(tmp_path: Path) -> None:
    from kinodit.trainer.engine.deepspeed.files import Files

    files = Files(str(tmp_path))
    given = torch.arange(12.0).view(3, 4).bfloat16()
    copied, zeros = files.copy(given), files.zeros_like(given)
    assert not any(tmp_path.iterdir())
    assert torch.equal(copied, given) and not zeros.any()
    zeros.view(-1).narrow(0, 2, 3).add_(1)
    assert float(zeros.sum()) == 3 and float(copied.sum()) == float(given.sum())
    assert mapped_bytes(tmp_path) > 0
    assert files.copy(torch.empty(0)).shape == (0,)


@needs_deepspeed
def test_a_disk_without_room_says_so_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinodit.trainer.engine.deepspeed.files import Files

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Files(str(tmp_path)).zeros_like(torch.ones(3))
    assert not any(tmp_path.iterdir())


@needs_deepspeed
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    from kinodit.trainer.engine.deepspeed.files import Files

    with pytest.raises(ConfigError, match="not a folder that can be written to"):
        Files(str(tmp_path / "absent"))


def mapped_bytes(folder: Path) -> int:
    """Of files in `folder` that this process has mapped; they have no name any more."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f" {folder}/" in line and line.endswith("(deleted)"):
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            total += stop - start
    return total


def trained(
    rank: int, world_size: int, small: Twin, config: DeepSpeedConfig
) -> tuple[dict[str, torch.Tensor], int, int]:
    """State after two updates, and bytes of it on this rank: in files, and in memory of its own."""
    # What is freed goes back to the system: M_MMAP_THRESHOLD, which glibc would raise by itself.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    engine = engine_of(small, rank, world_size, config)
    for step in range(2):
        backward(engine, small, step)
        engine.clip(1.0)
        engine.step(1e-3)
    in_memory = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]
    on_disk = mapped_bytes(Path(config.nvme_path)) if config.nvme_path else 0
    return whole(engine.state()), on_disk, 1024 * int(in_memory)


@needs_deepspeed
@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_it_trains_as_in_memory_to_the_last_bit(stage: int, tmp_path: Path, two: Ranks) -> None:
    small = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))
    disk = replace(ON_DISK if stage == 3 else ON_DISK_2, nvme_path=str(tmp_path))
    memory = DeepSpeedConfig(stage=stage, offload_optimizer="cpu")
    found, expected = two.run(trained, small, disk), two.run(trained, small, memory)
    for (one, on_disk, _), (other, nothing, _) in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        # Masters, gradients and two moments; parameters as well at stage 3.
        num_weights = sum(x.numel() for name, x in one.items() if name.startswith("model/"))
        assert on_disk >= (5 if stage == 3 else 4) * 4 * num_weights / 2
        assert nothing == 0
    assert not any(tmp_path.iterdir())


@needs_deepspeed
@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_its_memory_is_the_kernel_s_to_take(stage: int, tmp_path: Path) -> None:
    config = RunConfig(model=PRESETS["tiny"])
    large = replace(twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")), config=config)
    sizes = []
    for chosen in (
        DeepSpeedConfig(stage=stage, offload_optimizer="cpu"),
        DeepSpeedConfig(stage=stage, offload_optimizer="nvme", nvme_path=str(tmp_path)),
    ):
        groups = Groups()
        try:
            ((state, _, in_memory),) = groups[1].run(trained, large, chosen)
        finally:
            groups.close()
        sizes.append(in_memory)
    num_weights = sum(x.numel() for name, x in state.items() if name.startswith("model/"))
    # Masters, gradients and two moments, in float32.
    assert sizes[0] - sizes[1] > 0.8 * 16 * num_weights
