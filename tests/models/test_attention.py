"""The attention op against a dense mask, in every shape of layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kinodit.models.attention import (
    attend,
    attend_within,
    equal_runs,
    merge_groups,
)
from kinodit.models.tokens import AttentionLayout, ModalityTokens, build_layout

Visible = Callable[[int, int], bool]
H, D = 4, 6


def tokens(segment: list[int], group: list[int]) -> ModalityTokens:
    count = len(segment)
    return ModalityTokens(
        latents=torch.zeros(count, 1),
        segment=torch.tensor(segment, dtype=torch.int64),
        group=torch.tensor(group, dtype=torch.int64),
        position=torch.zeros(count, 3),
        role=torch.zeros(count, dtype=torch.int8),
        level=torch.zeros(count, dtype=torch.int64),
        weight=torch.zeros(count),
    )


def dense(
    q: Tensor, k: Tensor, v: Tensor, streams: list[ModalityTokens], visible: Visible
) -> Tensor:
    """Softmax over an explicit mask, in the joint order."""
    segment = torch.cat([stream.segment for stream in streams]).tolist()
    group = torch.cat([stream.group for stream in streams]).tolist()
    mask = torch.tensor(
        [
            [s == z and visible(g, h) for z, h in zip(segment, group, strict=True)]
            for s, g in zip(segment, group, strict=True)
        ]
    )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), -1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def everything(query: int, key: int) -> bool:
    return True


def causal(query: int, key: int) -> bool:
    return key <= query


def islands(query: int, key: int) -> bool:
    return query % 2 == key % 2


def blind_first(query: int, key: int) -> bool:
    return query > 0 and key > 0


LAYOUTS = {
    "one_segment": [tokens([0] * 5, [0] * 5), tokens([0] * 3, [0] * 3)],
    "equal_segments": [tokens([0, 0, 1, 1, 2, 2], [0] * 6), tokens([0, 1, 2], [0] * 3)],
    "unequal_segments": [
        tokens([0, 0, 0, 1, 2, 2], [0] * 6),
        tokens([0, 2, 2, 2], [0] * 4),
    ],
    "groups": [
        tokens([0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 0, 0, 3]),
        tokens([0, 0, 1, 1], [0, 2, 1, 1]),
    ],
    "one_stream": [tokens([0, 0, 0, 1, 1], [0, 1, 2, 0, 1])],
    "an_empty_stream": [tokens([0, 0, 1], [0, 1, 0]), tokens([], [])],
}


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("visible", [everything, causal, islands, blind_first])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attend_equals_a_dense_mask(name: str, visible: Visible, num_kv_heads: int) -> None:
    streams = LAYOUTS[name]
    layout = build_layout(streams, visible)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (
        torch.randn(layout.num_tokens, heads, D, generator=generator, dtype=torch.float64)
        for heads in (H, num_kv_heads, num_kv_heads, H)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = dense(q, k, v, streams, visible)
    found = attend(q, k, v, layout)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    got = torch.autograd.grad((found * weight).sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_full_visibility_merges_to_one_group_per_segment() -> None:
    layout = build_layout(LAYOUTS["groups"])
    assert len(layout.lengths) > 2
    merged = merge_groups(layout.lengths, layout.visible)
    assert merged.lengths == (6, 5)
    assert merged.is_block_diagonal


def test_merging_keeps_what_only_keys_tell_apart() -> None:
    # Groups 0 and 1 see the same, but group 2 sees group 1 alone.
    merged = merge_groups((1, 1, 1), ((0, 1), (0, 1), (1, 2)))
    assert merged.lengths == (1, 1, 1)
    merged = merge_groups((1, 1, 1), ((0, 1), (0, 1), (0, 1, 2)))
    assert (merged.lengths, merged.visible) == ((2, 1), ((0,), (0, 1)))


def test_segments_of_one_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return original(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    layout = AttentionLayout(None, None, (3, 3, 2), (0, 1, 2), ((0,), (1,), (2,)))
    q = torch.randn(8, H, D)
    attend(q, q, q, layout)
    assert calls == [(2, H, 3, D), (1, H, 2, D)]
    assert equal_runs((4, 4, 2, 4)) == [(2, 4), (1, 2), (1, 4)]


def test_no_copies_when_one_segment_is_in_order() -> None:
    layout = build_layout(LAYOUTS["one_segment"])
    assert layout.order is None
    q = torch.randn(8, H, D)
    out = attend(q, q, q, layout)
    assert out.is_contiguous()
    assert out.flatten(-2).data_ptr() == out.data_ptr()


def test_attention_of_no_tokens_reaches_its_inputs() -> None:
    layout = build_layout([tokens([], [])])
    q, k, v = (torch.zeros(0, heads, D, requires_grad=True) for heads in (H, 2, 2))
    out = attend(q, k, v, layout)
    assert out.shape == (0, H, D)
    out.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


def test_attention_within_a_stream_equals_a_dense_mask() -> None:
    stream = tokens([0, 0, 2, 2, 2, 3], [0] * 6)
    q, k, v = torch.randn(3, 6, H, D, dtype=torch.float64)
    found = attend_within(q, k, v, stream.segment, 5)
    torch.testing.assert_close(found, dense(q, k, v, [stream], everything))
