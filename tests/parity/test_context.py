"""Attention over tokens on several ranks equals attention in one place: output and gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kinodit.models.attention import attend
from kinodit.models.tokens import TokenBatch, Visibility, see_all
from kinodit.trainer.parallel.context import ContextAttention
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.sequence import Place, cut
from tests.models.packs import Sample, pack, random_sample
from tests.support.quick import quick
from tests.support.ranks import Ranks

HEAD_DIM = 8
GRIDS = {
    "odd": [{"video": (3, 5, 7), "text": (1, 1, 13)}, {"video": (1, 3, 3), "text": (1, 1, 1)}],
    "three streams": [
        {"video": (3, 2, 5), "text": (1, 1, 7), "audio": (3, 1, 3)},
        {"video": (1, 1, 1), "text": (1, 1, 2), "audio": (0, 1, 1)},
    ],
    "fewer tokens than ranks": [{"video": (1, 1, 1), "text": (1, 1, 2)}],
}


def skip_causal(query: int, key: int) -> bool:
    """Odd groups are noised, each after its clean one: they see themselves, and cleans before."""
    if key % 2:
        return key == query
    return key // 2 < query // 2 or key == query


MASKS: dict[str, Visibility] = {
    "full": see_all,
    "block_causal": lambda query, key: key <= query,
    "skip_causal": skip_causal,
    # Of most groups, ranks send nothing to each other.
    "first": lambda query, key: key == 0,
}
"""Name -> who sees whom; of all but the first, every frame is a group."""


@dataclass(frozen=True)
class Case:
    """grids: a key of GRIDS; mask: a key of MASKS"""

    grids: str
    cp: int
    ring: int
    mask: str = "full"
    num_heads: int = 4
    num_kv_heads: int = 4
    dtype: torch.dtype = torch.float64


def batch_of(case: Case) -> TokenBatch:
    generator = torch.Generator().manual_seed(5)
    samples: list[Sample] = []
    for grids in GRIDS[case.grids]:
        channels = dict.fromkeys(grids, 2)
        per_frame = case.mask != "full"
        samples.append(random_sample(generator, grids, channels, {}, per_frame=per_frame))
    return pack(samples, MASKS[case.mask])


def tensors(case: Case, num_tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, of the whole pack in its joint order."""
    generator = torch.Generator().manual_seed(6)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    shapes = [(num_tokens, count, HEAD_DIM) for count in heads]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(case.dtype) for x in drawn]


def with_gradients(op: object, parts: list[Tensor], layout: object) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in parts[:3])
    out = op(q, k, v, layout)  # type: ignore[operator]
    out.backward(parts[3])
    found = [x.grad for x in (q, k, v)]
    assert all(grad is not None for grad in found)
    return [out.detach(), *found]


def rank_errors(rank: int, world_size: int, case: Case) -> list[float]:
    """Largest errors of this rank's rows of output and gradients, over the largest value."""
    parallel = ParallelConfig(cp=case.cp, ring=case.ring)
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    batch = batch_of(case)
    ours = cut(batch, mesh.place)
    sizes = [tokens.num_tokens for tokens in batch.modalities.values()]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    rows = torch.cat([r + start for r, start in zip(ours.rows.values(), starts, strict=True)])
    parts = tensors(case, batch.num_tokens)
    expected = with_gradients(attend, parts, batch.layout)
    op = ContextAttention(mesh.place, mesh.heads, mesh.ring)
    found = with_gradients(op, [x[rows] for x in parts], ours.layout)
    errors = []
    for one, whole in zip(found, expected, strict=True):
        difference = (one - whole[rows]).abs()
        errors.append(float(difference.max() / whole.abs().max()) if len(rows) else 0.0)
    return errors


SHAPES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("grids", "mask", "shape"),
    quick(
        itertools.product(GRIDS, MASKS, SHAPES),
        # Every second one: each two of grids, mask and shape meet.
        *(
            (grids, mask, shape)
            for i, grids in enumerate(GRIDS)
            for j, mask in enumerate(MASKS)
            for k, shape in enumerate(SHAPES)
            if (i + j + k) % 2 == 0
        ),
    ),
    ids=str,
)
def test_equals_one_place(
    groups: dict[int, Ranks], grids: str, mask: str, shape: tuple[int, int]
) -> None:
    cp, ring = shape
    for errors in groups[cp].run(rank_errors, Case(grids, cp, ring, mask)):
        assert max(errors) < 1e-13


@pytest.mark.gloo
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize(("cp", "ring"), SHAPES)
def test_fewer_key_heads(groups: dict[int, Ranks], cp: int, ring: int, num_kv_heads: int) -> None:
    case = Case("odd", cp, ring, num_kv_heads=num_kv_heads)
    for errors in groups[cp].run(rank_errors, case):
        assert max(errors) < 1e-13


@pytest.mark.gloo
@pytest.mark.parametrize(("cp", "ring"), [(2, 1), (2, 2), (4, 2)])
def test_bfloat16_stays_within_its_rounding(groups: dict[int, Ranks], cp: int, ring: int) -> None:
    case = Case("odd", cp, ring, mask="block_causal", dtype=torch.bfloat16)
    for errors in groups[cp].run(rank_errors, case):
        assert max(errors) < 2e-2


@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (3, 1), (8, 1), (1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("mask", ["full", "block_causal"])
def test_every_token_is_dealt_once_and_every_rank_has_its_share(
    cp: int, tp: int, mask: str
) -> None:
    batch = batch_of(Case("odd", 1, 1, mask))
    cuts = [
        cut(batch, Place(index, cp, 1, tp_index, tp))
        for index in range(cp)
        for tp_index in range(tp)
    ]
    for name, tokens in batch.modalities.items():
        dealt = torch.cat([one.rows[name] for one in cuts])
        assert torch.equal(dealt.sort().values, torch.arange(tokens.num_tokens))
        sizes = [len(one.rows[name]) for one in cuts]
        assert max(sizes) - min(sizes) <= 1
        for first in range(0, cp * tp, tp):
            for one in cuts[first : first + tp]:
                assert one.layout.counts[name] == tuple(sizes[first : first + tp])
                assert torch.equal(one.rows[name], one.rows[name].sort().values)
    totals = [sum(len(rows) for rows in one.rows.values()) for one in cuts]
    assert max(totals) - min(totals) <= 1
    for hop in range(cp):
        place = Place(hop, 1, cp, 0, tp)
        pieces = cut(batch, place).layout.pieces[hop]
        assert sum(pieces) == sum(totals[hop * tp : (hop + 1) * tp])
        for piece, length in zip(pieces, batch.layout.lengths, strict=True):
            # Each stream's part of a group is dealt by itself, within one token a share.
            assert abs(piece - length / cp) < tp * len(batch.modalities)
