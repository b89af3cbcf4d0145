"""Kernels of other libraries in the megatron engine, against its own."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from kinodit.models.attention import attend
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.experts import Experts
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.grouped import GroupedExperts
from kinodit.trainer.engine.megatron.linears import swap_linears
from kinodit.trainer.engine.megatron.te import float8_context
from kinodit.trainer.engine.megatron.te_attention import fused
from kinodit.trainer.engine.megatron.te_norm import use_norms
from kinodit.trainer.parallel.table import table_of
from tests.support.devices import assert_as_alone
from tests.support.synthetic import synthetic_pack, tiny_model_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def needs(module: str, library: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(is_missing, reason=f"{library} is not installed")


needs_te = needs("transformer_engine", "TransformerEngine")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed")


def predicted(use_te: bool, float8: str, norms: Any = "own") -> torch.Tensor:
    model = MMDiT(tiny_model_config(width=64, num_heads=4, sandwich_norm=True))
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    model.to("cuda", torch.bfloat16)
    use_norms(model, MegatronConfig(norms=norms))
    swap_linears(model, table_of(model), None, 1, use_te=use_te)
    pack = synthetic_pack(0, [1, 2, 6], torch.bfloat16).to(torch.device("cuda"))
    with float8_context(float8)():  # type: ignore[arg-type]
        out: torch.Tensor = model(pack)["video"]
    out.square().sum().backward()
    return out.detach()


@needs_te
@pytest.mark.parametrize(("float8", "bound"), [("none", 0.02), ("tensorwise", 0.15)])
def test_linears_compute_what_megatron_core_s_do(float8: str, bound: float) -> None:
    expected, found = predicted(False, "none"), predicted(True, float8)
    assert float((found - expected).norm() / expected.norm()) < bound


@needs_te
def test_norms_and_rotations_compute_what_torch_s_do() -> None:
    expected, found = predicted(False, "none"), predicted(False, "none", "transformer_engine")
    assert float((found - expected).norm() / expected.norm()) < 0.02


@needs("grouped_gemm", "grouped_gemm")
@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
def test_experts_compute_what_torch_s_grouped_product_does(activation: Any) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 64, 128, activation, bias=True).to("cuda", torch.bfloat16)
    counts = torch.tensor([37, 0, 1, 90], device="cuda")
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    rows = torch.randn(128, 64).to("cuda", torch.bfloat16)
    found = []
    for kind in (Experts, GroupedExperts):
        experts.__class__ = kind
        experts.zero_grad()
        x = rows.clone().requires_grad_()
        out = experts(x, counts)
        out.float().square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in experts.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert float((theirs - ours).norm() / ours.norm().clamp(min=1e-6)) < 0.03


KERNELS = {
    "linears": MegatronConfig(linears="transformer_engine"),
    "attention": MegatronConfig(attention="transformer_engine"),
    "norms": MegatronConfig(norms="transformer_engine"),
}
DEALT = "t2v_moe_tiny", "dp_shard=2,ep=2"
GROUPED = MegatronConfig(dispatcher="alltoall", experts="grouped_gemm")
OVER_RANKS = [
    *(
        pytest.param("t2v_tiny", layout, engine, id=f"{name} {layout}", marks=needs_te)
        for name, engine in KERNELS.items()
        for layout in ("dp_shard=2", "tp=2", "cp=2")
    ),
    pytest.param("t2v_tiny", "tp=2", MegatronConfig(), id="core"),
    pytest.param("t2v_tiny", "tp=2", MegatronConfig(sequence_parallel=False), id="core no sp"),
    pytest.param(*DEALT, MegatronConfig(dispatcher="alltoall"), id="alltoall"),
    pytest.param(
        *DEALT, MegatronConfig(dispatcher="flex"), id="flex", marks=needs("deep_ep", "DeepEP")
    ),
    pytest.param(*DEALT, GROUPED, id="grouped", marks=needs("grouped_gemm", "grouped_gemm")),
]


@needs_two
@needs("megatron", "megatron-core")
@pytest.mark.parametrize(("recipe", "text", "engine"), OVER_RANKS)
def test_it_trains_as_one_device_does(
    recipe: str, text: str, engine: MegatronConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_alone(recipe, text, engine, monkeypatch)


@needs_te
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
