"""The data order: which samples make up a step, as a pure function of a frozen spec and the step.

`plan` gives the packs of a step, `assign` the packs of one rank. Nothing else decides order, so
the state of the data stream is the step alone, and ranks, threads and prefetching cannot change
what is trained on. Cost and memory of a step do not depend on its number nor on the size of the
datasets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinodit.data.order import permute
from kinodit.data.spec import PlanError, PlanSpec
from kinodit.models.tokens import SampleKey


@dataclass(frozen=True)
class SampleRef:
    """One sample of a step.

    slot:    its place in the global batch, 0 to samples_per_step - 1
    dataset: name of its dataset
    index:   its number in the dataset
    epoch:   how often the dataset was gone through before
    """

    slot: int
    dataset: str
    index: int
    epoch: int

    @property
    def sample_id(self) -> str:
        """Names the sample whatever the order: `DATASET:INDEX`."""
        return f"{self.dataset}:{self.index}"

    def key(self, step: int) -> SampleKey:
        """The key of every random draw for this sample in this step."""
        return SampleKey(step, self.slot, self.sample_id)


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step over all ranks, in packs; `tokens` are the packs' costs at most."""

    step: int
    packs: tuple[tuple[SampleRef, ...], ...]
    tokens: tuple[int, ...]


def plan(spec: PlanSpec, step: int) -> GlobalBatch:
    """The global batch of `step` (0-based): a pure function.

    Samples are put into the packs longest first, each into the emptiest one (Graham, "Bounds on
    multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969); ties go by slot and by pack.
    """
    if step < 0:
        raise PlanError(f"step {step} does not exist: steps count from 0")
    refs, costs = _samples(spec, step)
    order = sorted(range(len(refs)), key=lambda slot: (-costs[slot], slot))
    loads = [0] * spec.packs_per_step
    packs: list[list[int]] = [[] for _ in loads]
    for slot in order:
        pack = min(range(len(loads)), key=lambda p: (loads[p], len(packs[p]), p))
        loads[pack] += costs[slot]
        packs[pack].append(slot)
    return GlobalBatch(
        step=step,
        packs=tuple(tuple(refs[slot] for slot in sorted(pack)) for pack in packs),
        tokens=tuple(loads),
    )


def assign(batch: GlobalBatch, dp_index: int, dp_size: int) -> tuple[tuple[SampleRef, ...], ...]:
    """The packs of data-parallel rank `dp_index` of `dp_size`: every `dp_size`-th, from its own.

    All ranks get the same number of packs; where they do not divide, the last is empty: `()`.
    """
    if not 0 <= dp_index < dp_size:
        raise PlanError(f"data-parallel rank {dp_index} is not within 0 to {dp_size - 1}")
    count = -(-len(batch.packs) // dp_size)
    own = batch.packs[dp_index::dp_size]
    return own + ((),) * (count - len(own))


def _samples(spec: PlanSpec, step: int) -> tuple[list[SampleRef], list[int]]:
    """The samples of a step by slot, and their costs."""
    chosen, places = spec.mixture.slots(step * spec.samples_per_step, spec.samples_per_step)
    by_epoch: dict[tuple[int, int], list[int]] = {}
    for slot, (dataset, place) in enumerate(zip(chosen.tolist(), places, strict=True)):
        epoch = place // spec.datasets[dataset].num_eligible
        by_epoch.setdefault((dataset, epoch), []).append(slot)
    refs: list[SampleRef | None] = [None] * len(places)
    costs = [0] * len(places)
    for (number, epoch), slots in by_epoch.items():
        dataset = spec.datasets[number]
        size = dataset.num_eligible
        within = np.array([places[slot] - epoch * size for slot in slots], dtype=np.uint64)
        drawn = permute(within, size, spec.seed, "order", dataset.name, epoch).astype(np.int64)
        indices = drawn if dataset.eligible is None else dataset.eligible[drawn]
        tokens = np.broadcast_to(np.asarray(dataset.tokens), (size,))[drawn]
        for slot, index, cost in zip(slots, indices.tolist(), tokens.tolist(), strict=True):
            refs[slot] = SampleRef(slot, dataset.name, index, epoch)
            costs[slot] = cost
    return [ref for ref in refs if ref is not None], costs
