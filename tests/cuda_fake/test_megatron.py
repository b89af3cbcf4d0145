"""The megatron engine's options on pretended CUDA tensors: full width, one rank of eight.

What megatron-core brings is its own code. Of TransformerEngine and grouped_gemm there is the
interface: they are given what their kernels take, and give back tensors of the right shape.
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinodit.launch.accept.pretended import Pretended, forward
from kinodit.models.config import MMDiTConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.core import grouped_gemm_util
from kinodit.trainer.engine.megatron.grouped import use_grouped_gemm
from kinodit.trainer.engine.megatron.linears import swap_linears
from kinodit.trainer.engine.megatron.te_attention import use_kernels
from kinodit.trainer.engine.megatron.te_norm import use_norms
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig
from kinodit.trainer.parallel.table import table_of
from tests.cuda_fake.test_model import one_of_each_block, two_clips
from tests.trainer.engine import test_te, test_te_norm

RANK = 3
TP, CP = ParallelConfig(dp_shard=1, tp=8), ParallelConfig(dp_shard=1, cp=8)


def on_device(*tensors: Tensor) -> None:
    assert all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the libraries were asked to compute."""
    found: list[str] = []

    class Linear(test_te.StandIn):
        def forward(self, x: Tensor) -> Tensor:
            found.append("linear")
            on_device(x)
            assert x.shape[1] == self.sizes[0] and x.dtype == torch.bfloat16
            return super().forward(x)

    class RMSNorm(test_te_norm.StandIn):
        def forward(self, x: Tensor) -> Tensor:
            found.append("norm")
            on_device(x)
            return super().forward(x)

    class DotProductAttention(nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.settings = settings

        def forward(self, q: Tensor, k: Tensor, v: Tensor, **ends: Any) -> Tensor:
            found.append("attention")
            on_device(q, k, v, ends["cu_seqlens_q"], ends["cu_seqlens_kv"])
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            assert ends["cu_seqlens_q"].dtype == torch.int32
            assert q.shape[1] == self.settings["num_attention_heads"]
            return torch.empty_like(q).flatten(1)

    def rotate(t: Tensor, freqs: Tensor, **settings: Any) -> Tensor:
        found.append("rotation")
        on_device(t, freqs)
        return test_te_norm.apply_rotary_pos_emb(t, freqs, **settings)

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        found.append("grouped")
        on_device(a, b)
        assert a.dtype == b.dtype == torch.bfloat16 and trans_b and a.is_contiguous()
        assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64
        assert a.shape[1] == b.shape[2] and batch_sizes.shape == b.shape[:1]
        return a.new_empty(len(a), b.shape[1])

    names = ("", ".pytorch", ".pytorch.attention", ".pytorch.attention.rope")
    package, pytorch, attention, rope = (ModuleType(f"transformer_engine{name}") for name in names)
    for kind in (Linear, RMSNorm, DotProductAttention):
        setattr(pytorch, kind.__name__, kind)
    rope.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]
    for module in (package, pytorch, attention, rope):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(grouped_gemm_util, "ops", SimpleNamespace(gmm=gmm))
    return found


def run(config: MMDiTConfig, parallel: ParallelConfig, engine: MegatronConfig) -> Pretended:
    """The forward of one rank, laid out as the megatron engine does it."""

    def before(model: MMDiT, mesh: Mesh) -> None:
        use_grouped_gemm(model, engine)
        use_norms(model, engine)
        group = None if mesh.tp_mesh is None else mesh.tp_mesh.get_group()
        use_te = engine.linears == "transformer_engine"
        swap_linears(model, table_of(model), group, parallel.tp, use_te=use_te)

    batch = two_clips(config, torch.bfloat16)
    return forward(
        config,
        parallel,
        batch,
        RANK,
        before=before,
        after=lambda model, mesh: use_kernels(model, engine),
    )


@pytest.mark.parametrize("parallel", [TP, CP], ids=["tp8", "cp8"])
def test_megatron_core_s_linears_never_wait_for_the_device(parallel: ParallelConfig) -> None:
    config = one_of_each_block("2b")
    found = run(config, parallel, MegatronConfig())
    native = forward(config, parallel, two_clips(config, torch.bfloat16), RANK)
    assert found.shapes == native.shapes
    for kind in ("alltoall", "allgather", "reduce_scatter"):
        assert found.messages(kind) == native.messages(kind)


@pytest.mark.parametrize(
    ("setting", "asked"),
    [("linears", {"linear"}), ("attention", {"attention"}), ("norms", {"norm", "rotation"})],
)
@pytest.mark.parametrize("parallel", [TP, CP], ids=["tp8", "cp8"])
def test_transformer_engine_gets_what_its_kernels_take(
    parallel: ParallelConfig, setting: str, asked: set[str], taken: list[str]
) -> None:
    config = one_of_each_block("2b")
    engine = MegatronConfig(**{setting: "transformer_engine"})  # type: ignore[arg-type]
    found = run(config, parallel, engine)
    assert set(taken) == asked
    assert any("varlen" in op for op in found.ops) == (setting != "attention")


@pytest.mark.parametrize("parallel", [TP, ParallelConfig(dp_shard=8, ep=4)], ids=["tp8", "ep4"])
def test_grouped_gemm_gets_what_its_kernels_take(
    parallel: ParallelConfig, taken: list[str]
) -> None:
    pools = {"video": ExpertsConfig(num_experts=8)}
    config = dataclasses.replace(one_of_each_block("2b"), experts=pools)
    found = run(config, parallel, MegatronConfig(experts="grouped_gemm"))
    assert set(taken) == {"grouped"} and "aten::_grouped_mm" not in found.ops
