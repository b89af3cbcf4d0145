"""Samples kept as bits are those of the mask, one by one and all together."""

from __future__ import annotations

import numpy as np
import pytest

from kinodit.data.chosen import Chosen


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 9000, 2_000_000])
def test_the_kth_sample_and_its_place(size: int, share: float) -> None:
    mask = np.random.default_rng(size).random(size) < share
    # A stretch of whole blocks without any.
    mask[1024:4096] = False
    expected = np.flatnonzero(mask)
    chosen = Chosen(mask)
    assert len(chosen) == len(expected)
    assert np.array_equal(chosen.numbers(), expected)
    places = np.random.default_rng(1).permutation(len(expected))[:5000]
    assert np.array_equal(chosen[places], expected[places])
    for place in places[:20].tolist():
        assert chosen.place_of(int(expected[place])) == place
    assert np.array_equal(Chosen.of(expected[::-1]).numbers(), expected)


def test_a_hundred_million_take_13_megabytes() -> None:
    chosen = Chosen(np.ones(1_000_000, dtype=np.bool_))
    assert chosen._bits.nbytes + chosen._before.nbytes < 0.14 * 1_000_000
