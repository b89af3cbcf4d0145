"""What a data order will do, before a run: classes, epochs, packs, balance, reads, shuffling.

Everything of a step is measured on steps of the plan itself, the first ones of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinodit.data.fill import cost_of
from kinodit.data.manifest import Dataset
from kinodit.data.plan import GlobalBatch, assign, plan
from kinodit.data.reference_counts import ReferenceCounts
from kinodit.data.remote import MIB
from kinodit.data.spec import DatasetSpec, PlanSpec

_PIECE = 1 << 20
CORRELATION = 0.1
"""Of samples of one shard, assumed in the design effect: shards are often of one source."""


@dataclass(frozen=True)
class DatasetLine:
    """One dataset: its share of the samples, what its filters left, and steps of an epoch."""

    name: str
    share: float
    num_samples: int
    num_eligible: int
    epoch_steps: float
    selection: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ClassLine:
    """Samples of one size: (frames, rows, columns) or None for the recipe's, tokens, how many.

    samples and cost are shares of all, weighted as the mixture has them
    """

    shape: tuple[int, int, int] | None
    tokens: int
    samples: float
    cost: float


@dataclass(frozen=True)
class Steps:
    """Means over the steps that were looked at.

    samples:     (least, mean, most) of a step
    packs:       of a step; `rounds` of as many packs as there are data-parallel ranks
    used:        tokens of a pack by the token budget; None without a budget
    waiting:     the sum over rounds of the costliest rank by the mean: 1 is none
    empty:       share of a round's packs that hold nothing
    shards:      different shards that a step reads from; `bytes` that it reads
    fetched:     bytes of the blocks that all these steps fetch, by those that they use, of shards
                 that lie elsewhere; None where none do, or no blocks are kept
    same_shard:  samples of a step from the shard of one of its samples, on average
    same_if_full: the same of a full shuffle
    """

    num_steps: int
    samples: tuple[int, float, int]
    packs: float
    rounds: float
    used: float | None
    waiting: float
    empty: float
    shards: float
    bytes: float
    fetched: float | None
    same_shard: float
    same_if_full: float

    @property
    def design_effect(self) -> float:
        """By how much more a step's mean varies than one of a full shuffle does.

        1 + (m - 1) rho, with m samples of a step from one shard and rho the correlation within one
        (Kish, "Survey Sampling", 1965, section 5.4), by the same of a full shuffle.
        """
        one = 1 + (self.same_shard - 1) * CORRELATION
        return one / (1 + (self.same_if_full - 1) * CORRELATION)


@dataclass(frozen=True)
class OrderReport:
    """What `kinodit data plan` shows. references: None where the recipe takes none."""

    datasets: tuple[DatasetLine, ...]
    classes: tuple[ClassLine, ...]
    tokens: Mapping[int, int]
    num_ranks: int
    token_budget: int | None
    steps: Steps
    references: ReferenceCounts | None = None


def collect(
    spec: PlanSpec,
    datasets: Mapping[str, Dataset],
    num_ranks: int,
    num_steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> OrderReport:
    """The report of a plan: on `num_ranks` data-parallel ranks, from its first `num_steps` steps.

    Whole windows are looked at, so that there may be some more steps. `progress` is called with
    (steps done, steps).
    """
    num_steps = -(-num_steps // spec.window_steps) * spec.window_steps
    batches = []
    for step in range(num_steps):
        batches.append(plan(spec, step))
        progress(step + 1, num_steps)
    shares = np.array(spec.mixture.shares) / spec.mixture.period
    lines = tuple(
        DatasetLine(
            part.name,
            float(share),
            part.num_samples,
            part.num_eligible,
            part.num_eligible / (spec.samples_per_step * float(share)),
            part.selection,
        )
        for part, share in zip(spec.datasets, shares, strict=True)
    )
    drawn = Counter[int]()
    for part in spec.datasets:
        drawn.update(part.token_counts())
    return OrderReport(
        datasets=lines,
        classes=_classes(spec, shares),
        tokens=dict(sorted(drawn.items())),
        num_ranks=num_ranks,
        token_budget=spec.token_budget,
        steps=_steps(spec, datasets, batches, num_ranks),
    )


def _classes(spec: PlanSpec, shares: NDArray[np.float64]) -> tuple[ClassLine, ...]:
    counts: dict[tuple[tuple[int, int, int] | None, int], float] = {}
    for part, share in zip(spec.datasets, shares.tolist(), strict=True):
        for name, count in _class_counts(part).items():
            counts[name] = counts.get(name, 0.0) + count * share / part.num_eligible
    costs = {
        name: weight * int(cost_of(np.array([name[1]]), spec.parity_tokens)[0])
        for name, weight in counts.items()
    }
    whole = sum(costs.values())
    found = [
        ClassLine(shape, tokens, weight, costs[shape, tokens] / whole)
        for (shape, tokens), weight in counts.items()
    ]
    return tuple(sorted(found, key=lambda line: -line.cost))


def _class_counts(part: DatasetSpec) -> Counter[tuple[tuple[int, int, int] | None, int]]:
    size = part.num_eligible
    found: Counter[tuple[tuple[int, int, int] | None, int]] = Counter()
    for start in range(0, size, _PIECE):
        places = np.arange(start, min(start + _PIECE, size))
        rows = np.zeros(len(places), np.int64) if part.shape_of is None else part.shape_of[places]
        pairs = rows.astype(np.int64) << 32 | part.tokens_at(places)
        for pair, count in zip(*np.unique(pairs, return_counts=True), strict=True):
            row, length = divmod(int(pair), 1 << 32)
            found[part.shapes[row] if part.shapes else None, length] += int(count)
    return found


def _steps(
    spec: PlanSpec, datasets: Mapping[str, Dataset], batches: Sequence[GlobalBatch], ranks: int
) -> Steps:
    sizes = [sum(map(len, batch.packs)) for batch in batches]
    most = mean = 0.0
    packs = rounds = filled = tokens = 0
    shards: list[int] = []
    read: list[int] = []
    together: list[float] = []
    for batch in batches:
        costs = dict(zip((id(pack) for pack in batch.packs), batch.costs, strict=True))
        dealt = [[costs.get(id(p), 0) for p in assign(batch, r, ranks)] for r in range(ranks)]
        by_round = np.array(dealt, dtype=np.int64).T
        most += float(by_round.max(1).sum())
        mean += float(by_round.mean(1).sum())
        packs += len(batch.packs)
        rounds += len(by_round)
        filled += sum(1 for pack in batch.packs if pack)
        tokens += sum(batch.tokens)
        places = Counter[str]()
        num_bytes = 0
        for ref in (ref for pack in batch.packs for ref in pack):
            path, _, size = datasets[ref.dataset].locate(ref.index)
            places[str(path)] += 1
            num_bytes += size
        shards.append(len(places))
        read.append(num_bytes)
        together.append(sum(n * n for n in places.values()) / max(1, sum(places.values())))
    return Steps(
        num_steps=len(batches),
        samples=(min(sizes), sum(sizes) / len(sizes), max(sizes)),
        packs=packs / len(batches),
        rounds=rounds / len(batches),
        used=tokens / packs / spec.token_budget if spec.token_budget else None,
        waiting=most / mean,
        empty=1 - filled / (rounds * ranks),
        shards=sum(shards) / len(shards),
        bytes=sum(read) / len(read),
        fetched=_fetched(datasets, batches),
        same_shard=sum(together) / len(together),
        same_if_full=_same_if_full(spec, datasets),
    )


def _fetched(datasets: Mapping[str, Dataset], batches: Sequence[GlobalBatch]) -> float | None:
    """Each block counts once: these are few steps, beside what a cache holds."""
    blocks: dict[tuple[str, int], int] = {}
    used = 0
    for ref in (ref for batch in batches for pack in batch.packs for ref in pack):
        dataset = datasets[ref.dataset]
        if not dataset.url or dataset.storage.cache_gib <= 0:
            continue
        shard, offset, size = dataset.span(ref.index)
        length = round(dataset.storage.block_mib * MIB)
        used += size
        for number in range(offset // length, (offset + size - 1) // length + 1):
            left = shard.num_bytes - number * length
            blocks[dataset.place_of(shard), number] = min(length, left)
    return sum(blocks.values()) / used if used else None


def _same_if_full(spec: PlanSpec, datasets: Mapping[str, Dataset]) -> float:
    """Samples of a step from the shard of one of them, expected of samples drawn at random."""
    found = 0.0
    for part, share in zip(spec.datasets, spec.mixture.shares, strict=True):
        own = share / spec.mixture.period
        sizes = np.array([s.num_samples for s in datasets[part.name].manifest.shards], np.float64)
        meeting = float(((sizes / sizes.sum()) ** 2).sum())
        found += own * (1 + (spec.samples_per_step * own - 1) * meeting)
    return found
