"""Ops that differ between CPU and CUDA: the CUDA ones on pretended tensors, shapes and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kinodit.trainer.parallel.ring import FLASH


@pytest.mark.parametrize(("num_queries", "num_keys"), [(226, 56_697), (1, 1), (512, 0)])
def test_flash_attention_with_its_log_sum_exp(num_queries: int, num_keys: int) -> None:
    flash = FLASH["cuda"]
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(1, 24, num_queries, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, 24, num_keys, 64, dtype=torch.bfloat16, device="cuda")
        out, lse = flash.forward(q, k, torch.empty_like(k))
        gradients = flash.backward(torch.empty_like(out), q, k, torch.empty_like(k), out, lse)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == "cuda"
    assert lse.shape == (1, 24, num_queries) and lse.dtype == torch.float32
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]
    assert all(x.dtype == torch.bfloat16 and x.device.type == "cuda" for x in gradients)
