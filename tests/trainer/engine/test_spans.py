from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.trainer.engine import spans
from kinodit.trainer.engine.spans import Span, overlap, redistribute, row_spans
from tests.support.ranks import Ranks

SHAPES = {"matrix": (5, 3), "vector": (7,), "short": (1, 4), "cube": (4, 2, 3)}


def test_rows_are_dealt_out_as_fsdp_does() -> None:
    assert row_spans((5, 3), 4) == [(0, 6), (6, 12), (12, 15), (15, 15)]
    assert row_spans((1, 4), 2) == [(0, 4), (4, 4)]
    assert row_spans((6,), 1) == [(0, 6)]


def test_overlap_is_what_both_have() -> None:
    assert overlap((2, 7), (5, 9)) == (5, 7)
    start, stop = overlap((0, 2), (5, 9))
    assert start == stop


def flat_spans(num_ranks: int) -> dict[str, list[Span]]:
    """One flat buffer of all of them, cut into equal parts wherever that falls, as ZeRO does."""
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    part = -(-sum(sizes.values()) // num_ranks)
    offsets = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    made = {}
    for name, size in sizes.items():
        cuts = [min(max(rank * part - offsets[name], 0), size) for rank in range(num_ranks + 1)]
        made[name] = list(itertools.pairwise(cuts))
    return made


def there_and_back(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert isinstance(group, ProcessGroup)
    whole = {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + 100 * index
        for index, (name, shape) in enumerate(SHAPES.items())
    }
    flat = flat_spans(world_size)
    rows = {name: row_spans(shape, world_size) for name, shape in SHAPES.items()}

    def own(at: dict[str, list[Span]]) -> dict[str, Tensor]:
        return {name: whole[name][slice(*at[name][rank])].clone() for name in SHAPES}

    for number in (1 << 24, 6):
        spans.MESSAGE_NUMEL = number
        for have, want in ((flat, rows), (rows, flat)):
            wanted = {name: torch.full_like(part, -1.0) for name, part in own(want).items()}
            redistribute(own(have), have, wanted, want, group)
            for name, part in own(want).items():
                assert torch.equal(wanted[name], part), name


@pytest.mark.gloo
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_number_arrives_where_it_is_wanted(num_ranks: int) -> None:
    ranks = Ranks(num_ranks)
    try:
        ranks.run(there_and_back)
    finally:
        ranks.close()
