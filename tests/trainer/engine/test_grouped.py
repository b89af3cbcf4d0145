"""Experts by the grouped GEMM of megatron-core: a stand-in with its interface."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kinodit.launch.plan.measure import families
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.experts import Experts
from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.core import grouped_gemm_util
from kinodit.trainer.engine.megatron.grouped import GroupedExperts, use_grouped_gemm
from kinodit.trainer.engine.refusals import Wish, refusal
from kinodit.trainer.parallel.apply import PrecisionConfig
from tests.support.wishes import cuda_wish

CONFIG = MegatronConfig(experts="grouped_gemm")
WISH = cuda_wish(CONFIG)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The counts of each product."""
    found: list[list[int]] = []

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        assert a.is_contiguous() and batch_sizes.dtype == torch.int64
        assert batch_sizes.device.type == "cpu"
        found.append(batch_sizes.tolist())
        parts = zip(a.split(found[-1]), b, strict=True)
        return torch.cat([rows @ (weight.t() if trans_b else weight) for rows, weight in parts])

    monkeypatch.setattr(grouped_gemm_util, "ops", SimpleNamespace(gmm=gmm))
    return found


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_experts_do(
    activation: str, bias: bool, calls: list[list[int]]
) -> None:
    source = torch.Generator().manual_seed(0)
    own = Experts(3, 8, 12, activation, bias).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    x = torch.randn(7, 8, generator=source, dtype=torch.float64)
    counts = torch.tensor([4, 0, 3])
    outs, gradients = [], []
    for kind in (Experts, GroupedExperts):
        own.__class__ = kind
        own.zero_grad()
        given = x.clone().requires_grad_()
        out = own(given, counts)
        out.square().sum().backward()
        outs.append(out.detach())
        gradients.append([given.grad, *(p.grad for p in own.parameters())])
    assert calls == [[4, 0, 3]] * (3 if activation == "swiglu" else 2)
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert own(x, counts, read=lambda experts: experts.up) is own.up


def test_only_where_it_is_asked_for() -> None:
    for config, kind in ((CONFIG, GroupedExperts), (MegatronConfig(), Experts)):
        with torch.device("meta"):
            model = MMDiT(families()["experts"].model)
        use_grouped_gemm(model, config)
        assert {type(layer.experts) for layer in moe_layers(model).values()} == {kind}


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(WISH, device="cpu"), "needs a CUDA device, found cpu: set engine.experts=own"),
        (replace(WISH, precision=PrecisionConfig()), "kernels for precision.compute=bfloat16"),
    ],
)
def test_refused_with_the_reason(wish: Wish, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert reason in refusal(wish)
    assert refusal(WISH) == refusal(replace(wish, elsewhere=True)) == ""


def test_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs grouped_gemm, which is not installed" in refusal(WISH)
