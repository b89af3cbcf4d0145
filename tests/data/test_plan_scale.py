"""Plans of a hundred million samples take no memory that grows; choosing, a few bytes each."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.manifest import INDEX_DTYPE, PIECE_SAMPLES, Piece
from kinodit.data.plan import plan
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel, DatasetSpec, PlanSpec

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


class ManyClips:
    """As much of a dataset as selecting from it asks: clips of 3 sizes and of 2 to 20 seconds."""

    def __init__(self, num_pieces: int) -> None:
        self.num_pieces = num_pieces
        self.content_hash, self.is_exact = "h", True
        self.manifest = SimpleNamespace(shards=range(num_pieces))

    def __len__(self) -> int:
        return self.num_pieces * PIECE_SAMPLES

    def pieces(self) -> Iterator[Piece]:
        rows = np.zeros(PIECE_SAMPLES, INDEX_DTYPE)
        numbers = np.arange(PIECE_SAMPLES)
        rows["height"], rows["width"] = 240 * (1 + numbers % 3), 640
        rows["duration_ms"] = 2000 + numbers % 18_000
        rows["num_frames"], rows["fps_milli"] = rows["duration_ms"] * 24 // 1000, 24_000
        for number in range(self.num_pieces):
            yield Piece(number * PIECE_SAMPLES, rows)


def test_choosing_samples_takes_a_few_bytes_for_each() -> None:
    entry = DatasetConfig("clips", filter="short_side >= 480 and duration_s < 15")
    config = DataConfig(datasets={"clips": entry}, num_frames=49, fps=16, samples_per_step=256)
    peaks = []
    for num_pieces in (2, 6):
        clips: Any = ManyClips(num_pieces)
        tracemalloc.start()
        spec = plan_spec(config, {"clips": clips}, CostModel(1000, None), seed=0)
        assert spec.fingerprint
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert 0 < spec.datasets[0].num_eligible < len(clips)
    assert (peaks[1] - peaks[0]) / (4 * PIECE_SAMPLES) < 8
