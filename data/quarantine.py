"""Samples that cannot be used: what took their place, why, and how many are too many.

What a step holds is a function of the plan, the data and the entries of that step in the ledger. A
damaged sample fails wherever it is read; one that took too long need not, so that the ledger, not a
second try, decides what a replayed step holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from kinodit.data.config import QuarantineConfig
from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef
from kinodit.data.spec import DatasetSpec, PlanSpec
from kinodit.models.errors import UserError
from kinodit.models.random import generator

LEDGER_FILE = "quarantine.jsonl"
"""In the run's folder: one `Replacement` a line."""

_DRAWS = 256
_ROUNDS = 64
MIN_BAD_IN_SHARD = 3
"""Bad samples of one shard before its share counts: one of four samples is no bad shard yet."""


class QuarantineError(UserError):
    """Too much of the data is bad, or a ledger cannot be read."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used. `offset` is its first byte in the shard; key "" unknown."""

    index: int
    shard: str
    offset: int
    key: str
    reason: str


@dataclass(frozen=True)
class Replacement:
    """One place of one step that another sample took.

    dataset: of both samples
    wanted:  the sample that the plan asks for
    used:    the sample that took its place
    faults:  the wanted sample's first, then those of substitutes that were bad, too
    """

    step: int
    slot: int
    dataset: str
    wanted: int
    used: int
    faults: tuple[Fault, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data: a line of the ledger."""
        return asdict(self)

    @classmethod
    def parse(cls, row: Mapping[str, Any] | None) -> Replacement:
        """The inverse of `to_json`. Raises QuarantineError."""
        try:
            values = dict(row or {})
            faults = tuple(Fault(**fault) for fault in values.pop("faults"))
            found = cls(**values, faults=faults)
        except (KeyError, TypeError) as error:
            raise QuarantineError(f"a line of {LEDGER_FILE} is damaged: {error}") from error
        numbers = (found.step, found.slot, found.wanted, found.used)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise QuarantineError(f"a line of {LEDGER_FILE} has wrong numbers: {numbers}")
        return found

    def __str__(self) -> str:
        first = self.faults[0]
        return (
            f"step {self.step}, slot {self.slot}: sample {self.dataset}:{self.wanted} "
            f"({first.shard} at byte {first.offset}) was replaced by {self.dataset}:{self.used}: "
            f"{first.reason}"
        )


def substitute(
    spec: PlanSpec, dataset: Dataset, step: int, ref: SampleRef, tried: Iterable[int]
) -> SampleRef:
    """What takes the place of `ref` once the samples `tried` have failed: a pure function.

    A sample of the same dataset, modality and token cost, so that neither packs nor budgets change;
    where there is none left, a cheaper one of the modality. Drawn by the place and the number of
    failures, so that every rank and every restart draws the same.

    Raises:
        QuarantineError: every sample of the dataset that could stand in has failed.
    """
    part = next(item for item in spec.datasets if item.name == ref.dataset)
    failed = set(tried)
    place = (spec.seed, "substitute", step, ref.slot, ref.sample_id, len(failed))
    source = generator(*place)
    cost, modality = _cost_of(part, ref.index), dataset.row(ref.index).modality
    for _ in range(_ROUNDS):
        positions = source.integers(0, part.num_eligible, _DRAWS)
        for index in part.samples(positions[part.tokens_at(positions) == cost]).tolist():
            if index not in failed and dataset.row(index).modality == modality:
                return instead(spec, ref, index)
    everything = np.arange(part.num_eligible)
    for index in _cheaper(part, everything, cost):
        if index not in failed and dataset.row(index).modality == modality:
            return instead(spec, ref, index)
    raise QuarantineError(
        f"nothing can replace sample {ref.sample_id}: no other sample of dataset {ref.dataset!r} "
        f"is of its modality, costs at most {cost} tokens and has not failed, too "
        f"({len(failed)} did); `kinodit data validate --decode` lists what is damaged"
    )


def instead(spec: PlanSpec, ref: SampleRef, index: int) -> SampleRef:
    """`ref` with another sample of its dataset, in that one's size."""
    part = next(item for item in spec.datasets if item.name == ref.dataset)
    if part.shape_of is None:
        return structs.replace(ref, index=index)
    shape = part.shapes[part.shape_of[_position(part, index)]]
    return structs.replace(ref, index=index, shape=shape)


def _cheaper(part: DatasetSpec, positions: NDArray[np.int64], cost: int) -> list[int]:
    """Samples of at most `cost` tokens, the costliest first."""
    fit = positions[part.tokens_at(positions) <= cost]
    order = np.argsort(-part.tokens_at(fit), kind="stable")
    found: list[int] = part.samples(fit[order]).tolist()
    return found


def _cost_of(part: DatasetSpec, index: int) -> int:
    return int(part.tokens_at(np.array([_position(part, index)]))[0])


def _position(part: DatasetSpec, index: int) -> int:
    return index if part.eligible is None else part.eligible.place_of(index)


class Quotas:
    """Counts what was replaced in a run; too much of it is an error.

    Bad samples are counted once, however often they come up.
    """

    def __init__(
        self, config: QuarantineConfig, datasets: Mapping[str, Dataset], samples_per_step: int
    ) -> None:
        self._config = config
        self._samples_per_step = samples_per_step
        self._sizes = {
            dataset.place_of(shard): shard.num_samples
            for dataset in datasets.values()
            for shard in dataset.manifest.shards
        }
        self._bad: dict[str, set[int]] = {}

    @property
    def num_bad(self) -> int:
        """Different samples that were bad."""
        return sum(map(len, self._bad.values()))

    def count(self, replacements: Iterable[Replacement]) -> None:
        """Counts the replacements of one step (or those of a ledger, without `check`)."""
        for replacement in replacements:
            for fault in replacement.faults:
                self._bad.setdefault(fault.shard, set()).add(fault.offset)

    def check(self, replacements: Iterable[Replacement]) -> None:
        """Raises QuarantineError if the step of `replacements`, or a shard, has too many bad."""
        found = list(replacements)
        allowed = self._config.max_step_share * self._samples_per_step
        if len(found) > max(1.0, allowed):
            raise QuarantineError(
                f"{len(found)} of the {self._samples_per_step} samples of step {found[0].step} had "
                "to be replaced; data.quarantine.max_step_share allows "
                f"{self._config.max_step_share:g}. The first one: {found[0]}"
            )
        for shard in dict.fromkeys(fault.shard for item in found for fault in item.faults):
            bad, size = len(self._bad.get(shard, ())), self._sizes.get(shard, 0)
            if bad >= MIN_BAD_IN_SHARD and bad > self._config.max_shard_share * size:
                raise QuarantineError(
                    f"{bad} of the {size} samples of {shard} are bad; "
                    f"data.quarantine.max_shard_share allows {self._config.max_shard_share:g}. The "
                    f"last one: {found[-1]}. Restore the shard, or allow more"
                )
