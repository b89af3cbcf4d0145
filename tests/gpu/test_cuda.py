"""What only a CUDA device can show: its kernels against ours, offloading, no waiting for it.

Everything that does not need one is shown on CPU and on pretended CUDA tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kinodit.models.attention import Visibility, by_segment, varlen_cuda
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.certify.layouts import with_degrees
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel import remat
from kinodit.trainer.parallel.apply import model_blocks
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig, apply_remat
from kinodit.trainer.parallel.ring import FLASH
from tests.support.ranks import ROOT
from tests.support.synthetic import synthetic_pack, tiny_model_config

NUM_DEVICES = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
needs_two = pytest.mark.skipif(NUM_DEVICES < 2, reason="two CUDA devices are needed")
BF16_ERROR = 2e-2
"""Of attention outputs around 1 in bfloat16."""


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(len(shape))
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_varlen_kernel_is_attention_by_segment(num_kv_heads: int) -> None:
    lengths = (226, 1, 77, 513)
    visibility = Visibility(lengths, tuple((index,) for index in range(len(lengths))))
    total = sum(lengths)
    q, k, v = drawn(total, 4, 64), drawn(total, num_kv_heads, 64), drawn(total, num_kv_heads, 64)
    found = varlen_cuda(q, k, v, visibility)
    expected = by_segment(q.double(), k.double(), v.double(), visibility)
    assert float((found.double() - expected).abs().max()) < BF16_ERROR


def test_what_the_kernel_does_not_take_goes_another_way() -> None:
    visibility = Visibility((5, 3), ((0,), (1,)))
    for head_dim, dtype in ((12, torch.bfloat16), (64, torch.float32)):
        q, k, v = (drawn(8, 2, head_dim).to(dtype) for _ in range(3))
        found = varlen_cuda(q, k, v, visibility)
        expected = by_segment(q.double(), k.double(), v.double(), visibility)
        assert float((found.double() - expected).abs().max()) < BF16_ERROR


def test_flash_attention_and_its_backward_with_log_sum_exp() -> None:
    q, k, v, grad = (drawn(1, 4, 300, 64).requires_grad_() for _ in range(4))
    flash = FLASH["cuda"]
    out, lse = flash.forward(q.detach(), k.detach(), v.detach())
    logits = q.double() @ k.double().transpose(-1, -2) / 8
    expected = logits.softmax(-1) @ v.double()
    assert float((out.double() - expected).abs().max()) < BF16_ERROR
    assert float((lse.double() - logits.logsumexp(-1)).abs().max()) < BF16_ERROR
    found = flash.backward(grad.detach(), q.detach(), k.detach(), v.detach(), out, lse)
    wanted = torch.autograd.grad((expected * grad.double()).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 4 * BF16_ERROR


def test_a_step_never_waits_for_the_device() -> None:
    model = MMDiT(tiny_model_config(width=32)).to("cuda", torch.bfloat16)
    initialize(model, seed=1)
    batch = synthetic_pack(0, [1, 2, 6], torch.bfloat16).to(torch.device("cuda"))
    model(batch)["video"].square().sum().backward()  # kernels are chosen once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch)["video"].square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
def test_recomputing_and_offloading_change_no_gradient(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remat, "SMALL_BYTES", 0)

    def gradients(chosen: Any) -> list[Tensor]:
        model = MMDiT(tiny_model_config()).to("cuda")
        initialize(model, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02)
        apply_remat(RematConfig(chosen), model_blocks(model))
        batch = synthetic_pack(0, [1, 2, 6], torch.float32).to(torch.device("cuda"))
        model(batch)["video"].square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(mode), gradients("none"), strict=True):
        torch.testing.assert_close(one, other)


@needs_two
@pytest.mark.parametrize(
    "degrees",
    [{"dp_replicate": 2}, {"dp_shard": 2}, {"cp": 2}, {"cp": 2, "ring": 2}, {"tp": 2}],
    ids=str,
)
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_layouts_train_as_one_device_does(degrees: dict[str, int], cpu_offload: bool) -> None:
    small = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))
    layout = with_degrees(ParallelConfig(cpu_offload=cpu_offload), degrees)
    reference = dataclasses.replace(small.config, parallel=ParallelConfig())
    certifier = Certifier(dataclasses.replace(small, config=reference), device="cuda")
    try:
        row = certifier(Case(layout, "bfloat16"))
    finally:
        certifier.close()
    assert row.ok, row.faults
