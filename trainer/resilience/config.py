"""The recipe's `resilience` section."""

from __future__ import annotations

from dataclasses import dataclass

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about faults; none of it changes an undisturbed loss curve.

    save_margin_s: seconds before the end of the batch job at which the run saves and asks to be
        requeued, without waiting for a signal; 0 leaves that to signals
    """

    save_margin_s: float = 120.0

    def __post_init__(self) -> None:
        if self.save_margin_s < 0:
            raise ConfigError(f"resilience.save_margin_s={self.save_margin_s}: must be at least 0")
