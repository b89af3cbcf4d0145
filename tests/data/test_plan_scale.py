"""A plan of a hundred million samples takes no memory and no time that grows with them."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from kinodit.data.plan import plan
from kinodit.data.spec import DatasetSpec, PlanSpec

MILLION = 1_000_000


def spec_of(num_samples: int, shards: int, packing: bool) -> PlanSpec:
    """Two datasets, one in blocks of 16 of so many shards."""
    chunk = num_samples // shards
    parts = (
        DatasetSpec("clips", "", num_samples, 0.7, tokens=900, chunk=chunk, block_chunks=16),
        DatasetSpec("stills", "", num_samples // 3, 0.3, tokens=100),
    )
    if packing:
        return PlanSpec(parts, 256, 8, seed=0, packing="budget", token_budget=4000, window_steps=4)
    return PlanSpec(parts, 256, 8, seed=0)


@pytest.mark.parametrize("packing", [False, True])
def test_memory_and_time_do_not_grow_with_the_dataset(packing: bool) -> None:
    peaks = {}
    for size, shards in ((100 * 1000, 1000), (100 * MILLION, MILLION)):
        one = spec_of(size, shards, packing)
        plan(one, 0)  # what is made once: the mixture, the keys of the first blocks
        tracemalloc.start()
        first = plan(one, 40_001)  # begins at sample 10,240,256
        peaks[size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        refs = [ref for pack in first.packs for ref in pack]
        assert {ref.dataset for ref in refs} == {"clips", "stills"}
        assert len({(ref.dataset, ref.index, ref.epoch) for ref in refs}) == len(refs)
    small, large = peaks.values()
    assert large < 1.2 * small + 100_000 and large < 16 * MILLION


def test_a_resume_at_the_ten_millionth_sample_takes_under_a_second() -> None:
    one = spec_of(100 * MILLION, MILLION, packing=True)
    start = time.process_time()
    assert one.fingerprint
    plan(one, 10 * MILLION // 256)
    assert time.process_time() - start < 1.0
