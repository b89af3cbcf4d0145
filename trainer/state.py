"""What a checkpoint must hold besides tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from kinodit.models.errors import UserError

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or belongs to something else."""


@dataclass(frozen=True)
class GuardState:
    """What later verdicts about steps depend on (`trainer/resilience/guard.py`).

    recent:      (loss, gradient norm) of the last steps that were accepted, oldest first
    skips:       the last steps that were not
    num_skipped: how many were not, of all
    """

    recent: tuple[tuple[float, float], ...] = ()
    skips: tuple[int, ...] = ()
    num_skipped: int = 0

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """From what JSON made of it: tuples are lists there."""
        recent = tuple((float(loss), float(norm)) for loss, norm in fields["recent"])
        return cls(recent, tuple(fields["skips"]), fields["num_skipped"])


@dataclass(frozen=True)
class TrainState:
    """The position of a run: with the recipe it determines everything that comes.

    step:          optimizer steps done
    num_samples:   samples consumed
    num_tokens:    tokens consumed, of all modalities
    plan:          fingerprint of the data plan's spec
    data_offset:   steps of the data plan that were passed over: the next step takes the data of
                   plan step `step + data_offset`
    guard:         what the guard remembers
    """

    step: int
    num_samples: int
    num_tokens: int
    plan: str
    data_offset: int = 0
    guard: GuardState = GuardState()

    @property
    def data_step(self) -> int:
        """Step of the data plan that comes next."""
        return self.step + self.data_offset

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer has done."""
        return self.step - self.guard.num_skipped

    def to_json(self) -> str:
        """One JSON object with a format number."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> TrainState:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: not JSON, of another format, or with other fields.
        """
        try:
            fields = json.loads(text)
            found = fields.pop("format")
            if found != FORMAT:
                raise CheckpointError(
                    f"{where} has checkpoint format {found}; this version reads {FORMAT}"
                )
            if "guard" in fields:
                fields["guard"] = GuardState.from_fields(fields["guard"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{where} is damaged ({error}): remove that checkpoint"
            ) from error
