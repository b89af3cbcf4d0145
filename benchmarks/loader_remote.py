"""Bytes that are fetched from a store for each byte of a sample that is used, by the shuffle.

An epoch of 25,600 clips of 1 MiB in 100 shards of 256 MiB, 512 samples a step in the plan's order,
through a cache of a third of the dataset in blocks of 8 MiB, of which the longest unused goes
first. Block shuffle (`auto` for remote shards: 16 shards at a time) beside a full one. Nothing is
noisy here: these are counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from goals import Row

from kinodit.data.plan import plan
from kinodit.data.spec import DatasetSpec, PlanSpec

SHARDS, SAMPLES_PER_SHARD, SAMPLES_PER_STEP = 100, 256, 512
SAMPLES_PER_BLOCK = 8
CACHE_SHARE = 1 / 3
MAX_FETCHED = 1.05


def fetched(block_shards: int) -> float:
    """Samples' worth of bytes that are fetched for each sample of the epoch; 0: a full shuffle."""
    count = SHARDS * SAMPLES_PER_SHARD
    chunk = SAMPLES_PER_SHARD if block_shards else 0
    part = DatasetSpec("clips", "", count, tokens=1, chunk=chunk, block_chunks=block_shards)
    spec = PlanSpec((part,), SAMPLES_PER_STEP, 8, seed=0)
    room = int(CACHE_SHARE * count / SAMPLES_PER_BLOCK)
    held: OrderedDict[int, None] = OrderedDict()
    num_fetched = 0
    for step in range(count // SAMPLES_PER_STEP):
        for ref in (ref for pack in plan(spec, step).packs for ref in pack):
            block = ref.index // SAMPLES_PER_BLOCK
            num_fetched += block not in held
            held[block] = None
            held.move_to_end(block)
            if len(held) > room:
                held.popitem(last=False)
    return num_fetched * SAMPLES_PER_BLOCK / count


def rows() -> Iterator[Row]:
    """The rows of this family."""
    ours, full = fetched(16), fetched(0)
    note = "bytes fetched for each that is used"
    yield Row.at_most("fetched_per_used/block", ours, MAX_FETCHED, note)
    yield Row("fetched_per_used/full", full, ours, full >= ours, "beside it; the goal is ours")
