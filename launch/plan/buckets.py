"""What megatron-core's distributed optimizer keeps on a rank: exact; and what it sends, at least.

Parameters lie behind each other, the last ones first and each at a multiple of 64 numbers, in a
buffer that is cut into buckets; each bucket is filled up to a multiple of the ranks and of 128, and
cut into a stretch for each rank. Parameters and gradients are whole on every rank; masters, moments
and averages are those of its stretches alone (Rajbhandari et al., arXiv 1910.02054, section 5.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kinodit.launch.plan.communication import Messages
from kinodit.launch.plan.state import State, Weights
from kinodit.launch.plan.zero import MASTER_BYTES, OnRank
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.optim.build import STEP_BYTES
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.shard import SHARD
from kinodit.trainer.parallel.volume import Formats

ALIGNED, FILLED = 64, 128
"""Numbers to whose multiple the start of a parameter, and the end of a bucket, is moved up."""
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""megatron-core's rule for the numbers in a bucket: at least the first, and so many for a rank."""


@dataclass(frozen=True)
class Buckets:
    """Numbers, not bytes.

    sizes:   of each bucket
    own:     of each rank's stretches, without what fills them up
    pieces:  of each rank, how many parameters it has a part of
    largest: of the parameters
    """

    sizes: tuple[int, ...]
    own: tuple[int, ...]
    pieces: tuple[int, ...]
    largest: int

    @property
    def whole(self) -> int:
        """All of them."""
        return sum(self.sizes)


def buckets_of(weights: Weights, engine: MegatronConfig, parallel: ParallelConfig) -> Buckets:
    """How parameters lie in buckets over the dp_shard x cp ranks."""
    num_ranks = parallel.dp_shard * parallel.cp
    limit: float = math.inf
    if engine.overlap:
        limit = engine.bucket_numel or max(BUCKET, BUCKET_PER_RANK * num_ranks)
    sizes: list[int] = []
    own, pieces = [0] * num_ranks, [0] * num_ranks
    inside: list[tuple[int, int]] = []
    first = place = largest = 0

    def close(end: int) -> int:
        filled = _up(end, math.lcm(num_ranks, FILLED))
        share = (filled - first) // num_ranks
        for start, stop in inside:
            for rank in range((start - first) // share, (stop - 1 - first) // share + 1):
                begin = first + rank * share
                own[rank] += min(stop, begin + share) - max(start, begin)
                pieces[rank] += 1
        sizes.append(filled - first)
        inside.clear()
        return filled

    for shape in reversed(weights.local_shapes(parallel.tp)):
        numel = math.prod(shape)
        start = _up(place, ALIGNED)
        place = start + numel
        inside.append((start, place))
        largest = max(largest, numel)
        if place - first >= limit:
            first = place = close(place)
    if inside:
        close(place)
    return Buckets(tuple(sizes), tuple(own), tuple(pieces), largest)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def buckets_plan(
    cut: Buckets, weights: Weights, formats: Formats, num_averages: int, rank: int | None = None
) -> OnRank:
    """Bytes of one of the dp_shard x cp ranks; None: of the one that has most."""
    if rank is None:
        rank = max(range(len(cut.own)), key=lambda one: (cut.own[one], cut.pieces[one]))
    masters, is_narrow = cut.own[rank] * MASTER_BYTES, formats.compute < formats.params
    state = State(
        # Masters in the format of the model are the model's own numbers.
        parameters=cut.whole * formats.compute + (masters if is_narrow else 0),
        gradients=cut.whole * MASTER_BYTES,
        optimizer=2 * masters + cut.pieces[rank] * STEP_BYTES,
        averages=num_averages * (masters + weights.num_buffered * MASTER_BYTES),
    )
    # A gradient as autograd makes it, before it is added to those that are kept.
    return OnRank(state, 0, cut.largest * formats.compute)


def buckets_messages(cut: Buckets, parallel: ParallelConfig, formats: Formats) -> Messages | None:
    """What a rank is sent over dp_shard x cp in a step; None with one rank.

    Gradients are reduced and parameters gathered once a step, a message for each bucket.
    """
    num_ranks = parallel.dp_shard * parallel.cp
    if num_ranks == 1:
        return None
    num_bytes = (num_ranks - 1) / num_ranks * cut.whole * (MASTER_BYTES + formats.compute)
    return Messages(SHARD, 2 * len(cut.sizes), num_bytes, parallel.tp * num_ranks)
