"""megatron-core's distributed optimizer over NCCL, with nothing answered for."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kinodit.trainer.certify.engines import ENGINES
from kinodit.trainer.certify.layouts import parse_layouts
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT

HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed"),
    pytest.mark.skipif(not HAS_MEGATRON, reason="needs the extra megatron"),
]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("text", ["dp_shard=2", "cp=2"])
def test_it_trains_as_one_device_does(
    text: str, dtype: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = MegatronConfig(data_parallel="distributed_optimizer", overlap=overlap)
    monkeypatch.setitem(ENGINES, "asked for", engine)
    small = twin(load_config(ROOT / "configs/t2v_tiny.yaml"))
    (layout,) = parse_layouts(text, ParallelConfig())
    certifier = Certifier(small, "cuda")
    try:
        row = certifier(Case(layout, dtype, "asked for"))
    finally:
        certifier.close()
    assert row.ok, row.faults
