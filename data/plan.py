"""The data order: which samples make up a step, as a pure function of a frozen spec and the step.

`plan` gives the packs of a step, `assign` the packs of one rank. Nothing else decides order, so
the state of the data stream is the step alone, and ranks, threads and prefetching cannot change
what is trained on. Cost and memory of a step do not depend on its number nor on the size of the
datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from kinodit.data.fill import Packs, balanced, by_class, cost_of, split_rounds, within_budget
from kinodit.data.order import permute_by_blocks, permute_each
from kinodit.data.shapes import Shape
from kinodit.data.spec import DatasetSpec, PlanError, PlanSpec
from kinodit.models.random import KeyPart
from kinodit.models.tokens import SampleKey

DRAWN_AT_ONCE = 1024
"""Slots that are drawn together, about."""


class SampleRef(Struct, frozen=True, gc=False):
    """One sample of a step.

    slot:    its place in the global batch, 0 to samples_per_step - 1
    dataset: name of its dataset
    index:   its number in the dataset
    epoch:   how often the dataset was gone through before
    shape:   frames, rows and columns that it is decoded to; None: those of the recipe
    """

    slot: int
    dataset: str
    index: int
    epoch: int
    shape: Shape | None = None

    @property
    def sample_id(self) -> str:
        """Names the sample whatever the order: `DATASET:INDEX`."""
        return f"{self.dataset}:{self.index}"

    def key(self, step: int) -> SampleKey:
        """The key of every random draw for this sample in this step."""
        return SampleKey(step, self.slot, self.sample_id)


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step over all ranks, in packs.

    tokens: of the packs, at most
    costs:  of the packs: tokens, and attention in the same unit (`kinodit.data.fill.cost_of`)
    """

    step: int
    packs: tuple[tuple[SampleRef, ...], ...]
    tokens: tuple[int, ...]
    costs: tuple[int, ...]


def plan(spec: PlanSpec, step: int) -> GlobalBatch:
    """The global batch of `step` (0-based): a pure function.

    What `PlanSpec.packing` says decides how samples are put into packs (`kinodit.data.fill`).
    """
    if step < 0:
        raise PlanError(f"step {step} does not exist: steps count from 0")
    if spec.packing != "count":
        return _window(spec, step // spec.window_steps)[step % spec.window_steps]
    size = spec.samples_per_step
    per_run = max(1, DRAWN_AT_ONCE // size)
    run, place = divmod(step, per_run)
    drawn = _run(spec, run, per_run * size).part(place * size, size)
    return drawn.batch(step, balanced(drawn.tokens.tolist(), spec.packs_per_step))


@dataclass(frozen=True)
class _Drawn:
    """Samples of slots that follow each other, and what each takes up; n of each."""

    datasets: Sequence[str]
    indices: Sequence[int]
    epochs: Sequence[int]
    shapes: Sequence[Shape | None]
    tokens: NDArray[np.int64]
    costs: NDArray[np.int64]

    def part(self, first: int, count: int) -> _Drawn:
        """The slots `first` to `first + count` of these."""
        some = slice(first, first + count)
        return _Drawn(
            self.datasets[some], self.indices[some], self.epochs[some], self.shapes[some],
            self.tokens[some], self.costs[some],
        )  # fmt: skip

    def refs(self) -> list[SampleRef]:
        """By slot, counted from 0."""
        slots = range(len(self.indices))
        parts = self.datasets, self.indices, self.epochs, self.shapes
        return list(map(SampleRef, slots, *parts))

    def batch(self, step: int, packs: Packs) -> GlobalBatch:
        by_slot = self.refs().__getitem__
        return GlobalBatch(
            step=step,
            packs=tuple(tuple(map(by_slot, sorted(pack))) for pack in packs),
            tokens=tuple(int(self.tokens[pack].sum()) for pack in packs),
            costs=tuple(int(self.costs[pack].sum()) for pack in packs),
        )


@lru_cache(maxsize=2)
def _window(spec: PlanSpec, window: int) -> tuple[GlobalBatch, ...]:
    """The steps of a window of `spec.window_steps`, whose samples are put into rounds together.

    The costliest round first, each into the cheapest step: steps cost about the same, and each
    sample comes as often as without the window.
    """
    steps, samples = spec.window_steps, spec.samples_per_step
    first = window * steps
    drawn = _draw(spec, first * samples, steps * samples)
    if spec.packing == "class":
        classes = list(zip(drawn.shapes, drawn.tokens.tolist(), strict=True))
        rounds = by_class(classes, drawn.tokens, drawn.costs, spec.budget)
    else:
        packs = within_budget(drawn.tokens, drawn.costs, spec.budget)
        size = spec.packs_per_step
        rounds = [packs[start : start + size] for start in range(0, len(packs), size)]
    rounds = split_rounds(rounds, steps)
    costs = [sum(int(drawn.costs[pack].sum()) for pack in packs) for packs in rounds]
    dealt = balanced(costs, steps)
    batches = []
    for number, own in enumerate(dealt):
        packs = [pack for index in sorted(own) for pack in rounds[index]]
        batch = drawn.batch(first + number, packs)
        batches.append(_renumbered(batch))
    return tuple(batches)


def _renumbered(batch: GlobalBatch) -> GlobalBatch:
    """The batch with slots from 0, in the order in which the samples were drawn."""
    place = {s: n for n, s in enumerate(sorted(r.slot for pack in batch.packs for r in pack))}
    packs = tuple(
        tuple(structs.replace(ref, slot=place[ref.slot]) for ref in pack) for pack in batch.packs
    )
    return replace(batch, packs=packs)


def assign(batch: GlobalBatch, dp_index: int, dp_size: int) -> tuple[tuple[SampleRef, ...], ...]:
    """The packs of data-parallel rank `dp_index` of `dp_size`: every `dp_size`-th, from its own.

    All ranks get the same number of packs; where they do not divide, the last is empty: `()`.
    """
    if not 0 <= dp_index < dp_size:
        raise PlanError(f"data-parallel rank {dp_index} is not within 0 to {dp_size - 1}")
    count = -(-len(batch.packs) // dp_size)
    own = batch.packs[dp_index::dp_size]
    return own + ((),) * (count - len(own))


def _shuffled(
    dataset: DatasetSpec,
    positions: NDArray[np.uint64],
    keys: Sequence[tuple[KeyPart, ...]],
    which: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Where the permutations of an epoch each, of `keys` that of number `which`, send `positions`.

    All [n]; small datasets have many epochs in what is drawn together.
    """
    size = dataset.num_eligible
    if not dataset.chunk:
        return permute_each(positions, size, keys, which).astype(np.int64)
    found = np.empty_like(positions)
    for number, key in enumerate(keys):
        now = which == number
        found[now] = permute_by_blocks(
            positions[now], size, dataset.chunk, dataset.block_chunks, *key
        )
    return found.astype(np.int64)


@lru_cache(maxsize=8)
def _run(spec: PlanSpec, number: int, size: int) -> _Drawn:
    """The `number`-th run of `size` slots: what is done once for an array takes longest."""
    return _draw(spec, number * size, size)


def _draw(spec: PlanSpec, first: int, count: int) -> _Drawn:
    """The samples of the slots `first` to `first + count` of the run, numbered from 0."""
    chosen, periods, places = spec.mixture.slots(first, count)
    indices, tokens = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    # Whole numbers of any size.
    epochs = np.empty(count, dtype=np.object_)
    shapes: list[Shape | None] = [None] * count
    for number in np.unique(chosen).tolist():
        dataset = spec.datasets[number]
        slots = np.flatnonzero(chosen == number)
        before, begun = divmod(periods * spec.mixture.shares[number], dataset.num_eligible)
        turns, within = np.divmod(begun + places[slots], dataset.num_eligible)
        found, which = np.unique(turns, return_inverse=True)
        own_epochs = [before + turn for turn in found.tolist()]
        keys = [(spec.seed, "order", dataset.name, epoch) for epoch in own_epochs]
        drawn = _shuffled(dataset, within.astype(np.uint64), keys, which)
        indices[slots], tokens[slots] = dataset.samples(drawn), dataset.tokens_at(drawn)
        epochs[slots] = np.array(own_epochs, dtype=np.object_)[which]
        if dataset.shape_of is not None:
            for slot, row in zip(slots.tolist(), dataset.shape_of[drawn].tolist(), strict=True):
                shapes[slot] = dataset.shapes[row]
    names = [spec.datasets[number].name for number in chosen.tolist()]
    costs = cost_of(tokens, spec.parity_tokens)
    return _Drawn(names, indices.tolist(), epochs.tolist(), shapes, tokens, costs)
