"""TransformerEngine's attention as far as it reaches without CUDA: a stand-in for the library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.attention import attend, attend_to
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.te_attention import FusedAttention, fused
from kinodit.trainer.engine.refusals import Wish, refusal
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.context import ContextAttention
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.sequence import Place, cut
from tests.support.synthetic import synthetic_pack
from tests.support.wishes import cuda_wish

WISH = cuda_wish(MegatronConfig(attention="transformer_engine"))


class StandIn(nn.Module):
    """The part of DotProductAttention's documented interface that is used."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
        attn_mask_type: str,
    ) -> None:
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "thd", "padding")
        self.heads = num_attention_heads, num_gqa_groups, kv_channels
        self.calls = 0

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
    ) -> Tensor:
        heads, kv_heads, dim = self.heads
        assert q.shape[1:] == (heads, dim) and k.shape[1:] == v.shape[1:] == (kv_heads, dim)
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        ends = cu_seqlens_q.tolist()
        longest = max(end - start for start, end in pairwise(ends))
        assert max_seqlen_q == max_seqlen_kv == longest and ends[-1] == len(q)
        self.calls += 1
        parts = [attend_to(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(ends)]
        return torch.cat(parts).flatten(1)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = StandIn  # type: ignore[attr-defined]
    for module in (package, pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


def inputs(count: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(count, heads, 16, generator=source).to(dtype) for heads in (4, 2, 2))
    return q, k, v


def pack() -> TokenBatch:
    return synthetic_pack(0, [1, 2, 6], torch.float32)


def kernel_of(op: Any) -> FusedAttention:
    within = op.keywords["within"] if hasattr(op, "keywords") else op.within
    assert isinstance(within, FusedAttention)
    return within


def test_whole_segments_are_its_own_and_the_same() -> None:
    layout = pack().layout
    op, parts = fused(attend), inputs(sum(layout.lengths))
    for _ in range(2):
        torch.testing.assert_close(op(*parts, layout), attend(*parts, layout))
    (made,) = kernel_of(op).modules.values()
    assert made.calls == 2


def test_where_tokens_lie_on_several_ranks_it_computes_what_heads_were_exchanged_for() -> None:
    place = Place(0, 1, 1, 0, 2)
    layout = cut(pack(), place).of(pack()).layout
    parts = inputs(sum(layout.lengths))
    own = ContextAttention(place, None, None)
    op = fused(own)
    torch.testing.assert_close(op(*parts, layout), own(*parts, layout))
    (made,) = kernel_of(op).modules.values()
    assert made.calls == 1


def test_masks_and_wide_formats_go_the_model_s_own_way() -> None:
    layout = pack().layout
    halves = [part for length in layout.lengths for part in (1, length - 1)]
    first = [index - index % 2 for index in range(len(halves))]
    causal = replace(
        layout,
        lengths=tuple(halves),
        segments=tuple(owner for owner in layout.segments for _ in range(2)),
        visible=tuple(tuple(sorted({start, index})) for index, start in enumerate(first)),
    )
    op = fused(attend)
    for parts, shown in (
        (inputs(sum(layout.lengths), torch.float32), layout),
        (inputs(sum(layout.lengths)), causal),
    ):
        torch.testing.assert_close(op(*parts, shown), attend(*parts, shown))
    assert not kernel_of(op).modules


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(WISH, device="cpu"), "needs a CUDA device, found cpu: set engine.attention=own"),
        (replace(WISH, precision=PrecisionConfig()), "kernels for precision.compute=bfloat16"),
        (replace(WISH, parallel=ParallelConfig(cp=2, ring=2)), "set parallel.ring=1"),
    ],
)
def test_refused_with_the_reason(wish: Wish, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert reason in refusal(wish)
    assert refusal(replace(WISH, parallel=ParallelConfig(cp=2))) == ""


def test_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for plans of another machine, which still say what its kernels cannot do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in refusal(WISH)
    elsewhere = replace(WISH, device="cpu", elsewhere=True)
    assert refusal(elsewhere) == ""
    assert "set parallel.ring=1" in refusal(
        replace(elsewhere, parallel=ParallelConfig(cp=2, ring=2))
    )
