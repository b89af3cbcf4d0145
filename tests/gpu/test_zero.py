"""ZeRO over NCCL: its stages, and what is offloaded from a device to the host and to files."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinodit.trainer.certify.engines import ENGINES
from kinodit.trainer.certify.layouts import parse_layouts
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT

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


def assert_as_alone(text: str, engine: DeepSpeedConfig, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ENGINES, "asked for", engine)
    small = twin(load_config(ROOT / "configs/t2v_tiny.yaml"))
    (layout,) = parse_layouts(text, ParallelConfig())
    certifier = Certifier(small, "cuda")
    try:
        row = certifier(Case(layout, "bfloat16", "asked for"))
    finally:
        certifier.close()
    assert row.ok, row.faults


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("text", ["dp_shard=2", "tp=2", "cp=2"])
def test_stages_train_as_one_device_does(
    text: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_alone(text, DeepSpeedConfig(stage=stage), monkeypatch)


@pytest.mark.parametrize("engine", OFFLOADED, ids=lambda one: f"{one.offload_optimizer}{one.stage}")
def test_what_is_offloaded_trains_as_one_device_does(
    engine: DeepSpeedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path) if engine.offload_optimizer == "nvme" else ""
    assert_as_alone("dp_shard=2", replace(engine, nvme_path=folder), monkeypatch)
    assert not any(tmp_path.iterdir())
