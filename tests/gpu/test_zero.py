"""ZeRO over NCCL: its stages, and what is offloaded from a device to the host and to files."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinodit.trainer.engine.config import DeepSpeedConfig
from tests.support.devices import assert_as_alone

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed"),
    pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs the extra deepspeed"),
]
OFFLOADED = [
    DeepSpeedConfig(stage=2, offload_optimizer="cpu"),
    DeepSpeedConfig(stage=3, offload_optimizer="cpu", offload_params="cpu"),
    DeepSpeedConfig(stage=2, offload_optimizer="nvme"),
    DeepSpeedConfig(stage=3, offload_optimizer="nvme", offload_params="nvme"),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("text", ["dp_shard=2", "tp=2", "cp=2"])
def test_stages_train_as_one_device_does(
    text: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_alone("t2v_tiny", text, DeepSpeedConfig(stage=stage), monkeypatch)


@pytest.mark.parametrize("engine", OFFLOADED, ids=lambda one: f"{one.offload_optimizer}{one.stage}")
def test_what_is_offloaded_trains_as_one_device_does(
    engine: DeepSpeedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path) if engine.offload_optimizer == "nvme" else ""
    assert_as_alone("t2v_tiny", "dp_shard=2", replace(engine, nvme_path=folder), monkeypatch)
    assert not any(tmp_path.iterdir())
