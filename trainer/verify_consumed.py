"""Proves from the ledger that a run, with all its restarts, trained on its plan and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kinodit.data.plan import plan
from kinodit.data.spec import PlanSpec
from kinodit.trainer.consumed import Steps, read_lives, read_steps

MAX_SHOWN = 5
Places = Counter[tuple[int, str, int, int]]
"""(slot, dataset, epoch, sample) -> how often."""


@dataclass(frozen=True)
class Verdict:
    """What the ledger says.

    lost:        places of the plan at which nothing was trained on
    duplicated:  places, or samples of one epoch, that were trained on again
    unplanned:   samples that the plan does not have where they were used
    substituted: places at which another sample stood in for a damaged one
    passed_over: steps of the plan that the run went past after going back to a checkpoint
    faults:      the first of each kind, in words
    streams:     datasets of which nothing is proven: their places were only counted
    """

    num_lives: int
    num_steps: int
    num_samples: int
    lost: int
    duplicated: int
    unplanned: int
    substituted: int
    passed_over: int
    redone: int
    faults: tuple[str, ...]
    streams: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Nothing lost, nothing twice, nothing else; and no samples that nobody can name."""
        found = self.lost or self.duplicated or self.unplanned or self.faults
        return not (found or self.streams)


def verify(
    run_dir: Path, spec: PlanSpec, progress: Callable[[int, int], None] = lambda *_: None
) -> Verdict:
    """Compares the ledger of `run_dir` with the plan, place by place.

    Beside that, and whatever the plan says: no sample twice in one epoch of its dataset.

    Raises:
        ConsumedError: there is no ledger, or it cannot be read.
    """
    lives = read_lives(run_dir)
    steps = read_steps(run_dir, lives)
    faults = list(steps.torn[:MAX_SHOWN])
    plans = list(dict.fromkeys(life.plan for life in lives))
    if len(plans) > 1:
        faults.append(f"the data plan changed between starts: {', '.join(p[:12] for p in plans)}")
    lost = duplicated = unplanned = 0
    for step, places in steps.samples.items():
        progress(step + 1, len(steps.samples))
        batch = plan(spec, steps.plan_steps[step])
        expected = Counter(
            (ref.slot, ref.dataset, ref.epoch, ref.index) for pack in batch.packs for ref in pack
        )
        found = Counter((p.slot, p.dataset, p.epoch, p.wanted) for p in places)
        twice = sum(count - 1 for count in found.values())
        missing, other = expected - found, found - expected
        extra = sum(other.values()) - twice
        lost, duplicated, unplanned = (
            lost + sum(missing.values()), duplicated + twice, unplanned + max(0, extra),
        )  # fmt: skip
        if (missing or other) and len(faults) < MAX_SHOWN:
            faults.append(_told(step, missing, other))
    again = _seen_again(steps)
    faults += [f"sample {name} was trained on {count} times in one epoch" for name, count in again][
        : max(0, MAX_SHOWN - len(faults))
    ]
    return Verdict(
        num_lives=len(lives),
        num_steps=len(steps.samples),
        num_samples=sum(map(len, steps.samples.values())),
        lost=lost,
        duplicated=duplicated + sum(count - 1 for _, count in again),
        unplanned=unplanned,
        substituted=sum(p.used != p.wanted for places in steps.samples.values() for p in places),
        passed_over=_passed_over(steps),
        redone=steps.redone,
        faults=tuple(faults),
        streams=tuple(part.name for part in spec.datasets if not part.is_exact),
    )


def _told(step: int, missing: Places, other: Places) -> str:
    if missing:
        slot, dataset, _, index = min(missing)
        return f"step {step}: slot {slot} should have been {dataset}:{index}"
    slot, dataset, _, index = min(other)
    return f"step {step}: slot {slot} had {dataset}:{index}, once more than planned"


def _seen_again(steps: Steps) -> list[tuple[str, int]]:
    """Samples that were wanted more than once in one epoch."""
    seen: Counter[tuple[str, int, int]] = Counter(
        (p.dataset, p.epoch, p.wanted) for places in steps.samples.values() for p in places
    )
    return [(f"{name}:{index}", count) for (name, _, index), count in seen.items() if count > 1]


def _passed_over(steps: Steps) -> int:
    if not steps.plan_steps:
        return 0
    return max(steps.plan_steps.values()) + 1 - len(set(steps.plan_steps.values()))
