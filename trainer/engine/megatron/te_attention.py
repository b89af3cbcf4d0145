"""Attention by TransformerEngine's kernels: CUDA alone, by its documented interface.

They compute attention within the segments that lie on a rank. Where tokens lie on several, heads
are exchanged as ever (`trainer/parallel/context.py`), so that lengths need not divide: the
library's own context parallelism asks for segments that are cut into 2 cp equal parts.

Shape legend: J tokens of the joint sequence, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from kinodit.models.attention import (
    AttentionOp,
    attend,
    attend_segment_major,
    fits_flash,
    merge_groups,
    segment_ends,
)
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import AttentionLayout
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.te import library
from kinodit.trainer.parallel.context import ContextAttention


@dataclass(frozen=True)
class FusedAttention:
    """Attention of tokens in segment-major order, each to its whole segment.

    What the kernels do not take (masks within a segment, wide formats) goes the model's own way.
    modules: by (H, K, D)
    """

    modules: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        """q [J, H, D], k and v [J, K, D] -> [J, H, D]."""
        visibility = merge_groups(layout.lengths, layout.visible)
        if not visibility.is_block_diagonal or not fits_flash(q.dtype, q.shape[-1]):
            return attend_segment_major(q, k, v, layout)
        ends, longest = segment_ends(visibility.lengths, q.device), max(visibility.lengths)
        out: Tensor = self._module(q.shape[1], k.shape[1], q.shape[2])(
            q,
            k,
            v,
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return out.view(q.shape)

    def _module(self, heads: int, kv_heads: int, dim: int) -> Any:
        key = heads, kv_heads, dim
        if key not in self.modules:
            self.modules[key] = library().DotProductAttention(
                num_attention_heads=heads,
                kv_channels=dim,
                num_gqa_groups=kv_heads,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding",
            )
        return self.modules[key]


def fused(op: AttentionOp) -> AttentionOp:
    """The attention op `op` of a laid out model, with TransformerEngine's kernels in it."""
    if isinstance(op, ContextAttention):
        assert op.ring is None, "refused before"
        return replace(op, within=FusedAttention())
    return partial(attend, within=FusedAttention())


def use_kernels(model: nn.Module, engine: MegatronConfig) -> None:
    """Let the library's kernels compute attention of a laid out model, if `engine` says so."""
    if engine.attention == "transformer_engine":
        assert isinstance(model, MMDiT)
        model.attend = fused(model.attend)
