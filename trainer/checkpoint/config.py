"""How a run saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, how, and what it keeps.

    every_steps:   0 = only at the end
    keep_last:     older ones are removed, 0 = keep all
    mode:          async: training goes on while a copy of the state is written; sync: it waits
    on_failure:    what a save that fails (a full disk) means: go on with the checkpoints that are
                   there, or stop
    strict:        stop at a broken checkpoint instead of going back to the one before
    accept_drift:  resume although the recipe, data or code differ from what was saved; what
                   differs is listed
    """

    every_steps: int = 500
    keep_last: int = 2
    mode: Literal["async", "sync"] = "async"
    on_failure: Literal["continue", "stop"] = "continue"
    strict: bool = False
    accept_drift: bool = False

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep_last < 0:
            raise ConfigError(
                f"checkpoint.every_steps={self.every_steps}, keep_last={self.keep_last}: "
                "must not be negative"
            )
