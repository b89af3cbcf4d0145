"""The keyed permutation is one, and a mixture keeps its shares at every prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.order import (
    MAX_PERIOD,
    mixture,
    permute,
    permute_by_blocks,
    shares_of,
)
from kinodit.models.errors import ConfigError


def permuted(size: int, *key: int | str) -> list[int]:
    return [int(x) for x in permute(np.arange(size, dtype=np.uint64), size, *key)]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permuted(size, seed, "order")) == list(range(size))


def test_permutation_depends_on_its_key_alone_and_on_every_part_of_it() -> None:
    keys: list[tuple[int | str, ...]] = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    orders = [permuted(100, *key) for key in keys]
    assert len({tuple(order) for order in orders}) == len(keys)
    assert orders == [permuted(100, *key) for key in keys]
    one_by_one = [int(permute(np.array([i], np.uint64), 100, *keys[0])[0]) for i in range(100)]
    assert one_by_one == orders[0]


def test_permutations_of_few_things_are_all_about_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(permuted(4, 7, "order", epoch))
        counts[order] = counts.get(order, 0) + 1
    # Chi-squared with 23 degrees of freedom exceeds 49.7 with probability 0.001.
    expected = 2400 / 24
    chi_squared = sum((counts.get(o, 0) - expected) ** 2 for o in counts) / expected
    chi_squared += (24 - len(counts)) * expected
    assert chi_squared < 49.7, counts


def test_neighbours_do_not_stay_neighbours() -> None:
    order = np.array(permuted(5000, 3))
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 0.05
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05


@pytest.mark.parametrize("size", [10**8, 2**62])
def test_huge_permutations_need_no_list(size: int) -> None:
    where = np.array([0, 1, size // 2, size - 1], dtype=np.uint64)
    found = permute(where, size, 0)
    assert len(set(found.tolist())) == 4 and max(found.tolist()) < size


def test_shares_are_exact_for_decimal_weights() -> None:
    assert shares_of([0.7, 0.3]) == (7, 3)
    assert shares_of([1, 2, 5]) == (1, 2, 5)
    assert shares_of([0.1, 0.2]) == (1, 2)
    assert shares_of([3.0]) == (1,)
    fine = shares_of([0.123456789, 0.876543211])
    assert sum(fine) == MAX_PERIOD and fine[0] == round(0.123456789 * MAX_PERIOD)


@pytest.mark.parametrize("weights", [[0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="positive number"):
        shares_of(weights)


def test_a_weight_too_small_to_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be kept exactly"):
        shares_of([1e-6, 1.0])


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_every_prefix_has_its_shares_to_within_one(weights: list[int]) -> None:
    mixed = mixture(shares_of([float(w) for w in weights]))
    choice = np.tile(mixed.choice, 3)
    chosen = np.eye(len(weights))[choice].cumsum(0)
    wanted = np.arange(1, len(choice) + 1)[:, None] * np.array(weights) / sum(weights)
    bound = 1 - 1 / max(2, 2 * len(weights) - 2) if len(weights) > 1 else 0
    assert np.abs(chosen - wanted).max() <= bound + 1e-9


def test_places_count_through_the_whole_run() -> None:
    mixed = mixture(shares_of([3.0, 1.0, 1.0]))

    def slots(first: int, count: int) -> list[tuple[int, int]]:
        datasets, periods, since = mixed.slots(first, count)
        pairs = zip(datasets.tolist(), since.tolist(), strict=True)
        return [(dataset, periods * mixed.shares[dataset] + place) for dataset, place in pairs]

    found = slots(0, 1000)
    for number in range(3):
        mine = [place for dataset, place in found if dataset == number]
        assert mine == list(range(len(mine)))
    assert slots(617, 50) == found[617:667]
    # Far beyond 64 bits, nothing is replayed.
    far = slots(5 * 10**20 + 617, 50)
    assert far == [(d, mixed.shares[d] * 10**20 + place) for d, place in found[617:667]]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 2000), chunk=st.integers(1, 90), group=st.integers(1, 6))
def test_blocks_are_a_permutation_too(size: int, chunk: int, group: int) -> None:
    places = np.arange(size, dtype=np.uint64)
    found = permute_by_blocks(places, size, chunk, group, 3, "order", 1)
    assert sorted(found.tolist()) == list(range(size))
    # One at a time, in another order, and with others beside: the same.
    some = np.random.default_rng(size).permutation(size)[:7].astype(np.uint64)
    alone = [int(permute_by_blocks(some[i : i + 1], size, chunk, group, 3, "order", 1)[0])
             for i in range(len(some))]  # fmt: skip
    assert alone == found[some.astype(np.int64)].tolist()


def test_blocks_read_from_few_places_and_differ_between_epochs() -> None:
    size, chunk, group = 10_000, 100, 4
    orders = [
        permute_by_blocks(np.arange(size, dtype=np.uint64), size, chunk, group, 3, "order", epoch)
        for epoch in range(3)
    ]
    for order in orders:
        for start in range(0, size - 400, 400):
            # Four chunks, each of which may lie across two of a hundred.
            assert len(set((order[start : start + 400] // chunk).tolist())) <= 8
        first = (order[:400] // chunk).tolist()
        assert first != sorted(first)
    assert not np.array_equal(orders[0], orders[1])
    # Which samples meet in a block differs between epochs, too.
    assert set(orders[0][:400].tolist()) != set(orders[1][:400].tolist())
    huge = permute_by_blocks(np.array([0, 10**8 - 1], np.uint64), 10**8, 1000, 16, 0)
    assert len(set(huge.tolist())) == 2
