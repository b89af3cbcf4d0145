"""Everything that the data order depends on, frozen: datasets, shares, packs, costs, seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kinodit.data.chosen import Chosen
from kinodit.data.fill import Budget, cost_of
from kinodit.data.order import Mixture, mixture, shares_of
from kinodit.data.shapes import Grid, Shape
from kinodit.models.errors import UserError

ORDER_VERSION = 1
"""Part of the fingerprint: to be raised when the same spec would give another order."""


Packing = Literal["count", "budget", "class"]


class PlanError(UserError):
    """A data stream that cannot be planned; the message has the numbers."""


@dataclass(frozen=True)
class CostModel:
    """Tokens that a sample can take up at most, by what it consists of.

    video_tokens: of a clip of the recipe's size and length
    image_tokens: of a still image; None if the recipe's codec takes none
    audio_tokens: of the sound of a sample; 0 if the recipe ignores it
    text_tokens:  of a caption, all text streams together, at their longest
    tokenizer:    fingerprint of the text encoders, which decide what a token is
    grid:         sizes that a clip may have, where each keeps its own
    parity_tokens: length at which attention takes as many FLOPs as all else; 0 leaves it out
    """

    video_tokens: int
    image_tokens: int | None
    audio_tokens: int = 0
    text_tokens: int = 0
    tokenizer: str = ""
    grid: Grid | None = None
    parity_tokens: int = 0


@dataclass(frozen=True, eq=False)
class DatasetSpec:
    """One dataset as the plan sees it.

    name:         its name in the recipe, part of every draw's key
    content_hash: of its manifest
    num_samples:  before any filter
    weight:       its share of the samples, relative to the other datasets
    eligible:     the n samples that take part; None means all
    tokens:       [n] integers, what each eligible sample costs at most; or one number for all
    selection:    (condition, samples that were left after it) in the order of evaluation
    shapes:       the sizes that samples are decoded to; empty: all to the recipe's
    shape_of:     [n] integers, the row of `shapes` of each eligible sample
    chunk:        samples that stay close to each other in an epoch, about a shard; 0: none do
    block_chunks: chunks that are mixed with each other
    is_exact:     false of a stream: its samples are only counted, any may take any place
    """

    name: str
    content_hash: str
    num_samples: int
    weight: float = 1.0
    eligible: Chosen | None = None
    tokens: NDArray[np.integer] | int = 1
    selection: tuple[tuple[str, int], ...] = ()
    shapes: tuple[Shape, ...] = ()
    shape_of: NDArray[np.integer] | None = None
    chunk: int = 0
    block_chunks: int = 0
    is_exact: bool = True

    def __post_init__(self) -> None:
        if self.num_eligible == 0:
            conditions = "; ".join(f"{text}: {left} left" for text, left in self.selection)
            raise PlanError(
                f"data.datasets.{self.name}: no sample of {self.num_samples} can be used"
                + (f" ({conditions}): loosen its filter" if conditions else ": it is empty")
            )
        for array in (self.tokens, self.shape_of):
            if isinstance(array, np.ndarray):
                array.flags.writeable = False

    @property
    def num_eligible(self) -> int:
        """Samples that take part: the length of an epoch, n."""
        return self.num_samples if self.eligible is None else len(self.eligible)

    @property
    def max_tokens(self) -> int:
        """The largest cost of a sample."""
        return int(np.max(self.tokens))

    def samples(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] the samples at `places` among those that take part."""
        return places if self.eligible is None else self.eligible[places]

    def tokens_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] what the samples at `places` cost."""
        whole = np.broadcast_to(np.asarray(self.tokens), (self.num_eligible,))
        return whole[places].astype(np.int64)

    def token_counts(self) -> dict[int, int]:
        """How many samples cost how much."""
        if isinstance(self.tokens, int):
            return {self.tokens: self.num_eligible}
        values, counts = np.unique(self.tokens, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def describe(self) -> dict[str, object]:
        """What the order depends on, arrays as digests. Filters count by what they leave."""
        return {name: _digest(value) for name, value in _stated(self).items()}


@dataclass(frozen=True, eq=False)
class PlanSpec:
    """Everything the data order depends on. Two specs with one fingerprint give one order.

    datasets:         in the recipe's order
    samples_per_step: samples of one optimizer step over all ranks
    packs_per_step:   packs of one optimizer step over all ranks
    seed:             of the run; the same draws are keyed with it
    token_budget:     most tokens of a pack; None allows what the worst step needs
    cost:             what the datasets' `tokens` were computed from
    packing:          "count": as many packs as said; "budget": rounds of that many, as many as the
                      budgets ask for; "class": the same, with samples of one size in each round
    cost_budget:      most cost of a pack (`kinodit.data.fill.cost_of`); None bounds its tokens only
    window_steps:     steps whose samples are put into rounds together, with budgets or classes

    Raises PlanError if some step could have a pack above the budget, and if there are more packs
    than samples.
    """

    datasets: tuple[DatasetSpec, ...]
    samples_per_step: int
    packs_per_step: int
    seed: int
    token_budget: int | None = None
    cost: CostModel | None = None
    packing: Packing = "count"
    cost_budget: int | None = None
    window_steps: int = 1

    def __post_init__(self) -> None:
        if not self.datasets:
            raise PlanError("data.datasets is empty: name at least one dataset and its path")
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise PlanError(f"two datasets have the same name: {', '.join(names)}")
        if self.packing != "count":
            self._check_budgets()
        elif not 1 <= self.packs_per_step <= self.samples_per_step:
            raise PlanError(
                f"data.packs_per_step is {self.packs_per_step} with data.samples_per_step "
                f"{self.samples_per_step}: every pack needs a sample, so make it 1 to "
                f"{self.samples_per_step}"
            )
        elif self.token_budget is not None and self.worst_pack_tokens > self.token_budget:
            raise PlanError(self._over_budget(self.token_budget))

    @property
    def max_tokens(self) -> int:
        """The largest cost of one sample."""
        return max(dataset.max_tokens for dataset in self.datasets)

    @property
    def parity_tokens(self) -> int:
        """Length at which attention costs as much as all else; 0: samples cost their tokens."""
        return self.cost.parity_tokens if self.cost else 0

    @property
    def budget(self) -> Budget:
        """What packs are bounded by, with `packing` other than "count"."""
        assert self.token_budget is not None
        return Budget(self.packs_per_step, self.token_budget, self.cost_budget)

    @property
    def worst_pack_tokens(self) -> int:
        """A bound on the tokens of every pack of every step; exact if all samples cost the same.

        Longest-first packing puts a sample into the emptiest pack. So a pack above
        ceil(samples / packs) samples implies an emptier one below that number, and no pack exceeds
        ceil(samples / packs) of the largest; and as the last sample of a pack found it no fuller
        than the mean, no pack exceeds mean + (1 - 1 / packs) of the largest. A step holds at most
        ceil(share) + 1 samples of a dataset, since its count stays within 1 of its share at both
        ends of the step.
        """
        samples, packs, largest = self.samples_per_step, self.packs_per_step, self.max_tokens
        by_count = -(-samples // packs) * largest
        mixed = self.mixture
        counts = [min(samples, -(-samples * s // mixed.period) + 1) for s in mixed.shares]
        costs = sorted(
            ((d.max_tokens, c) for d, c in zip(self.datasets, counts, strict=True)), reverse=True
        )
        total, free = 0, samples
        for tokens, count in costs:
            total += tokens * min(count, free)
            free -= min(count, free)
        by_mean = (total + (packs - 1) * largest) // packs
        return min(by_count, by_mean)

    @cached_property
    def mixture(self) -> Mixture:
        """Which dataset fills which slot."""
        return mixture(shares_of([dataset.weight for dataset in self.datasets]))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything the order depends on."""
        text = json.dumps(self.describe(), sort_keys=True, default=vars)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """Everything the order depends on, arrays as digests: what the fingerprint is made of."""
        return {
            "order_version": ORDER_VERSION,
            "datasets": [dataset.describe() for dataset in self.datasets],
            "samples_per_step": self.samples_per_step,
            "packs_per_step": self.packs_per_step,
            "seed": self.seed,
            "token_budget": self.token_budget,
            "cost": _stated(self.cost) if self.cost else None,
            **{name: value for name, value in _stated(self).items() if name in _LATER},
        }

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each dataset has been gone through when `step` begins."""
        slots = step * self.samples_per_step
        rounds, rest = divmod(slots, self.mixture.period)
        begun = np.bincount(self.mixture.choice[:rest], minlength=len(self.datasets))
        return {
            dataset.name: (rounds * share + int(part)) / dataset.num_eligible
            for dataset, share, part in zip(self.datasets, self.mixture.shares, begun, strict=True)
        }

    def _check_budgets(self) -> None:
        """Every sample must fit into a pack of its own: then every step can be filled."""
        if self.token_budget is None:
            raise PlanError(
                f"data.packing={self.packing} needs data.token_budget: the tokens that one pack "
                f"may have (the longest sample has {self.max_tokens})"
            )
        limits = (("token_budget", self.token_budget, 0), ("cost_budget", self.cost_budget, 1))
        for dataset in self.datasets:
            counts = dataset.token_counts()
            tokens = np.array(list(counts), dtype=np.int64)
            for name, limit, by_cost in limits:
                sizes = cost_of(tokens, self.parity_tokens) if by_cost else tokens
                if limit is None or int(sizes.max()) <= limit:
                    continue
                above = sum(counts[n] for n in tokens[sizes > limit].tolist())
                raise PlanError(
                    f"data.{name} is {limit}, but {above} of the {dataset.num_eligible} samples "
                    f"of data.datasets.{dataset.name} are larger, up to {int(sizes.max())}: raise "
                    "it, lower data.num_frames, height or width, or leave them out by a filter"
                )

    def _over_budget(self, budget: int) -> str:
        sizes = ", ".join(f"{d.name} up to {d.max_tokens}" for d in self.datasets)
        text = (
            f"data.token_budget is {budget} tokens a pack, but {self.samples_per_step} samples a "
            f"step ({sizes} tokens each, captions at their longest) in {self.packs_per_step} packs "
            f"can need {self.worst_pack_tokens} in one pack: raise data.token_budget to "
            f"{self.worst_pack_tokens}"
        )
        fit = budget // self.max_tokens
        if fit == 0:
            return text + ", or make the samples smaller: not even one fits"
        packs = -(-self.samples_per_step // fit)
        return text + f", or data.packs_per_step to {packs}, or take fewer samples a step"


def _digest(value: object) -> object:
    pieces: Iterable[NDArray[np.integer]]
    if isinstance(value, np.ndarray):
        pieces = np.split(value, range(_PIECE, len(value), _PIECE))
    elif isinstance(value, Chosen):
        pieces = value.pieces()
    else:
        return value
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece, dtype="<i8").tobytes())
    return digest.hexdigest()


_PIECE = 1 << 20


_LATER = (
    "packing", "cost_budget", "window_steps", "grid", "parity_tokens", "shapes", "shape_of",
    "chunk", "block_chunks", "is_exact",
)  # fmt: skip
"""Fields that came later: left out of descriptions at their defaults, so that fingerprints of
specs that do not use them are what they were."""


def _stated(item: Any) -> dict[str, Any]:
    """The fields of a dataclass that the order depends on."""
    found = {part.name: (getattr(item, part.name), part.default) for part in fields(item)}
    return {
        name: value
        for name, (value, default) in found.items()
        if name != "selection" and not (name in _LATER and _is_default(value, default))
    }


def _is_default(value: object, default: object) -> bool:
    return not isinstance(value, np.ndarray) and value == default
