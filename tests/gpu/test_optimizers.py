"""Optimizers on CUDA: 8-bit moments by the compiled update, whole matrices over NCCL."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kinodit.trainer.certify.layouts import with_degrees
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.optim import AdamW8bitConfig, MuonConfig, build_optimizer
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def trained(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 2)).to(device)
    optimizer = build_optimizer(AdamW8bitConfig(), model)
    for step in range(4):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step)).to(device)
        model(x).square().sum().backward()
        optimizer.set_lr(1e-3)
        optimizer.step()
    return model


def test_the_compiled_update_of_8_bit_moments_is_the_eager_one() -> None:
    for one, other in zip(trained("cuda").parameters(), trained("cpu").parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed")
@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_muon_trains_as_one_device_does(degrees: dict[str, int]) -> None:
    small = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))
    config = dataclasses.replace(small.config, optim=MuonConfig(lr=3e-4))
    certifier = Certifier(dataclasses.replace(small, config=config), device="cuda")
    try:
        row = certifier(Case(with_degrees(ParallelConfig(), degrees), "bfloat16"))
    finally:
        certifier.close()
    assert row.ok, row.faults
