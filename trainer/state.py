"""What a checkpoint must hold besides tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from kinodit.models.errors import UserError

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or belongs to something else."""


@dataclass(frozen=True)
class TrainState:
    """The position of a run: with the recipe it determines everything that comes.

    step:          optimizer steps done; the data order is a function of it
    num_samples:   samples consumed
    num_tokens:    tokens consumed, of all modalities
    plan:          fingerprint of the data plan's spec
    """

    step: int
    num_samples: int
    num_tokens: int
    plan: str

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
            return cls(**fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where} is damaged ({error}): remove that checkpoint"
            ) from error
