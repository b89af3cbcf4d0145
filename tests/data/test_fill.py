"""Packs within budgets hold every sample once, and packs computed side by side cost alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.fill import (
    Budget,
    balanced,
    by_class,
    cost_of,
    split_rounds,
    within_budget,
)

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def test_a_sample_of_parity_length_costs_twice_its_tokens() -> None:
    tokens = np.array([10, 1000, 2000], dtype=np.int64)
    assert cost_of(tokens, 1000).tolist() == [10, 2000, 6000]
    assert cost_of(tokens, 0).tolist() == tokens.tolist()


@given(costs=st.lists(st.integers(0, 4), max_size=40), num_packs=st.integers(1, 7))
def test_ties_of_equal_packs_go_by_number_of_items_and_by_pack(
    costs: list[int], num_packs: int
) -> None:
    """Which pack a sample is in is part of the data order: it may never change."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        sizes = [(sum(costs[i] for i in pack), len(pack)) for pack in packs]
        packs[sizes.index(min(sizes))].append(item)
    assert balanced(costs, num_packs) == packs


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, packs=st.integers(1, 7), room=st.integers(100, 300), bound=st.booleans())
def test_packs_hold_all_samples_once_within_both_budgets(
    lengths: list[int], packs: int, room: int, bound: bool
) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    costs = cost_of(tokens, 50)
    limit = int(cost_of(np.array([100]), 50)[0]) if bound else None
    found = within_budget(tokens, costs, Budget(packs, room, limit))
    assert sorted(item for pack in found for item in pack) == list(range(len(lengths)))
    assert len(found) % packs == 0
    assert max(int(tokens[pack].sum()) for pack in found) <= room
    loads = [int(costs[pack].sum()) for pack in found]
    assert loads == sorted(loads, reverse=True)
    if limit is not None:
        assert loads[0] <= limit
    # No more rounds than a sample a pack takes.
    assert len(found) <= packs * -(-len(lengths) // packs)


def test_as_few_rounds_as_hold_the_samples() -> None:
    tokens = np.full(12, 10, dtype=np.int64)
    assert len(within_budget(tokens, tokens, Budget(2, 60))) == 2
    assert len(within_budget(tokens, tokens, Budget(2, 59))) == 4
    assert len(within_budget(tokens, tokens, Budget(2, 60, cost=30))) == 4


def test_costs_are_balanced_where_tokens_are_not() -> None:
    # One long sample costs as much as eight short ones with four times its tokens.
    tokens = np.array([100] + [50] * 8, dtype=np.int64)
    costs = np.array([800] + [100] * 8, dtype=np.int64)
    packs = within_budget(tokens, costs, Budget(2, 400))
    assert sorted(int(costs[pack].sum()) for pack in packs) == [800, 800]


@settings(deadline=None, max_examples=80)
@given(
    classes=st.lists(st.integers(1, 5), min_size=1, max_size=80),
    packs=st.integers(1, 6),
    room=st.integers(5, 20),
    limit=st.one_of(st.none(), st.integers(25, 60)),
)
def test_a_round_has_one_class_and_packs_of_equal_size(
    classes: list[int], packs: int, room: int, limit: int | None
) -> None:
    tokens = np.array(classes, dtype=np.int64)
    costs = tokens * tokens
    rounds = by_class(classes, tokens, costs, Budget(packs, room, limit))
    items = [item for packed in rounds for pack in packed for item in pack]
    assert sorted(items) == list(range(len(classes)))
    partial = 0
    for packed in rounds:
        assert len(packed) == packs
        sizes = {len(pack) for pack in packed}
        (name,) = {classes[item] for pack in packed for item in pack}
        fit = min(room // name, limit // name**2 if limit else room)
        assert max(sizes) <= fit and max(sizes) - min(sizes) <= 1
        partial += sizes != {fit}
    assert partial <= len(set(classes))


def test_rounds_are_halved_until_every_step_has_one() -> None:
    rounds = [[[0, 2, 4], [1, 3]], [[5], []]]
    halved = split_rounds(rounds, 4)
    assert len(halved) == 4
    assert sorted(i for packs in halved for pack in packs for i in pack) == list(range(6))
    assert all(len(packs) == 2 and any(packs) for packs in halved)
    assert split_rounds(rounds, 2) == rounds
    with pytest.raises(AssertionError, match="fewer samples"):
        split_rounds([[[0]]], 2)
