"""TransformerEngine's linears and attention in the megatron engine, against its own."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kinodit.models.attention import attend
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.engine.megatron.linears import swap_linears
from kinodit.trainer.engine.megatron.te import float8_context
from kinodit.trainer.engine.megatron.te_attention import fused
from kinodit.trainer.parallel.table import table_of
from tests.support.synthetic import synthetic_pack, tiny_model_config

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed"),
]


def predicted(use_te: bool, float8: str) -> torch.Tensor:
    model = MMDiT(tiny_model_config(width=64, num_heads=4))
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    model.to("cuda", torch.bfloat16)
    swap_linears(model, table_of(model), None, 1, use_te=use_te)
    pack = synthetic_pack(0, [1, 2, 6], torch.bfloat16).to(torch.device("cuda"))
    with float8_context(float8)():  # type: ignore[arg-type]
        out: torch.Tensor = model(pack)["video"]
    out.square().sum().backward()
    return out.detach()


@pytest.mark.parametrize(("float8", "bound"), [("none", 0.02), ("tensorwise", 0.15)])
def test_linears_compute_what_megatron_core_s_do(float8: str, bound: float) -> None:
    expected, found = predicted(False, "none"), predicted(True, float8)
    assert float((found - expected).norm() / expected.norm()) < bound


def test_attention_computes_what_the_model_s_own_does() -> None:
    pack = synthetic_pack(0, [1, 2, 6], torch.bfloat16).to(torch.device("cuda"))
    count = sum(pack.layout.lengths)
    found = []
    for op in (attend, fused(attend)):
        source = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(count, heads, 64, generator=source)
            .to("cuda", torch.bfloat16)
            .requires_grad_()
            for heads in (4, 2, 2)
        )
        out = op(q, k, v, pack.layout)
        out.float().square().sum().backward()
        found.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert float((theirs - ours).norm() / ours.norm()) < 0.02
