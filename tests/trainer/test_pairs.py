"""A ring shares attention evenly, and sends no key to a rank that has no query for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kinodit.models.tokens import AttentionLayout, ModalityTokens, Visibility, build_layout, see_all
from kinodit.trainer.parallel.pairs import keys_sent
from kinodit.trainer.parallel.sequence import Place, deal, pieces_of
from tests.support.pairs import imbalance, pairs_met, part_sent

MAX_IMBALANCE = 1.05
FRAME = 1560
"""Tokens of a latent frame of 480 x 832 pixels."""


def stream(runs: Sequence[tuple[int, int, int]]) -> ModalityTokens:
    """Tokens of one modality from (segment, group, count); nothing but their order matters."""
    segment = torch.cat([torch.full((count,), segment) for segment, _, count in runs])
    group = torch.cat([torch.full((count,), group) for _, group, count in runs])
    empty = torch.zeros(len(segment), 0)
    return ModalityTokens(empty, segment, group, empty, empty, empty, empty)


def causal(query: int, key: int) -> bool:
    return key <= query


def skip_causal(query: int, key: int) -> bool:
    """Group 0 is text, 2i + 1 the clean frame i, 2i + 2 the same noised."""
    if key == 0 or query == 0:
        return key == query or key == 0
    return (key - 1) // 2 < (query - 1) // 2 or key == query


def prefix(query: int, key: int) -> bool:
    """What is given sees itself, what is generated sees all."""
    return key == 0 or query == 1


def frames(segment: int, count: int, tokens: int = FRAME) -> list[tuple[int, int, int]]:
    return [(segment, frame, tokens) for frame in range(count)]


PACKS: dict[str, tuple[Visibility, list[list[tuple[int, int, int]]]]] = {
    "one clip": (see_all, [[(0, 0, 226)], [(0, 0, 56_697)]]),
    "a clip beside images": (
        see_all,
        [
            [(index, 0, 77 + index) for index in range(33)],
            [(0, 0, 32_761), *((index, 0, 255 + 7 * index) for index in range(1, 33))],
        ],
    ),
    "three streams": (
        see_all,
        [
            [(index, 0, 226) for index in range(3)],
            [(index, 0, 21 * FRAME // (index + 1)) for index in range(3)],
            [(index, 0, 217 + index) for index in range(3)],
        ],
    ),
    "block causal": (causal, [[(0, 0, 226)], frames(0, 21)]),
    "block causal of a few frames": (
        causal,
        [[(0, 0, 226), (1, 0, 31)], [*frames(0, 5, 1013), *frames(1, 2, 3001)]],
    ),
    "skip causal": (
        skip_causal,
        [[(0, 0, 226)], [(0, group, FRAME) for group in range(1, 15)]],
    ),
    "prefix": (prefix, [[(0, 0, 226)], [(0, 0, FRAME), (0, 1, 20 * FRAME)]]),
    "reference images": (
        lambda query, key: key == query or query == 0,
        [[(0, 0, 77)], [(0, 0, 4096), (0, 1, 1024), (0, 2, 777)]],
    ),
}
"""Name -> who sees whom, and (segment, group, tokens) of each modality."""

PLACES = [(1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 4, 1), (1, 16, 1), (1, 4, 2), (2, 2, 8)]
"""(ulysses, ring, tp)"""


def layout_of(name: str) -> AttentionLayout:
    visible, modalities = PACKS[name]
    return build_layout([stream(runs) for runs in modalities], visible)


@pytest.mark.parametrize(("ulysses", "ring", "tp"), PLACES)
@pytest.mark.parametrize("name", PACKS)
def test_pairs_are_shared_evenly(name: str, ulysses: int, ring: int, tp: int) -> None:
    layout = layout_of(name)
    pieces = pieces_of(layout, Place(0, ulysses, ring, 0, tp))
    pairs = pairs_met(pieces, layout.visible)
    assert sum(map(sum, pairs)) == layout.num_pairs
    assert imbalance(layout, pieces) <= MAX_IMBALANCE
    # Nobody waits in the middle of a ring either: in each turn all have as much to do.
    for turn in range(ring):
        met = [pairs[hop][(hop - turn) % ring] for hop in range(ring)]
        assert max(met) * ring <= MAX_IMBALANCE * sum(met)


def test_chunks_of_neighbours_would_not_be_even() -> None:
    """What the bound is there for: the same pack cut into four stretches."""
    layout = layout_of("block causal")
    share, taken = layout.num_tokens // 4, 0
    stretches: list[list[int]] = [[0] * len(layout.lengths) for _ in range(4)]
    for group, length in enumerate(layout.lengths):
        for _ in range(length):
            stretches[min(taken // share, 3)][group] += 1
            taken += 1
    assert imbalance(layout, tuple(map(tuple, stretches))) > 1.5


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
@pytest.mark.parametrize("visible", [see_all, causal, skip_causal, prefix])
def test_keys_are_sent_where_a_query_sees_them(visible: Visibility, ring: int) -> None:
    """Token by token, on groups of which some are shorter than the ring."""
    counts = [(0, 0, 3), (0, 1, 1), (0, 2, 5), (1, 0, 1), (1, 1, 2), (2, 0, 1)]
    tokens = stream(counts)
    layout = build_layout([tokens], visible)
    pieces = pieces_of(layout, Place(0, 1, ring))
    (held,) = deal([tokens.num_tokens], ring)

    def sees(query: int, key: int) -> bool:
        same = tokens.segment[query] == tokens.segment[key]
        return bool(same) and visible(int(tokens.group[query]), int(tokens.group[key]))

    total = 0
    for here in range(ring):
        for there in range(ring):
            queries, keys = held[here].tolist(), held[there].tolist()
            needed = [key for key in keys if any(sees(query, key) for query in queries)]
            sent = keys_sent(pieces, layout.visible, here, there)
            assert sum(sent) == (len(keys) if here == there else len(needed))
            total += sum(sent) * (here != there)
            met = sum(sees(query, key) for query in queries for key in keys)
            assert pairs_met(pieces, layout.visible)[here][there] == met
    assert part_sent(pieces, layout.visible) == total / (tokens.num_tokens * (ring - 1))


def test_all_keys_of_a_long_pack_are_seen() -> None:
    for name in PACKS:
        layout = layout_of(name)
        assert part_sent(pieces_of(layout, Place(0, 1, 8)), layout.visible) == 1
