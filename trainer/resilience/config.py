"""The recipe's `resilience` section."""

from __future__ import annotations

from dataclasses import dataclass, field

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class GuardConfig:
    """When a step's update is refused, and when the run goes back.

    spike_factor:  a loss or gradient norm above so many times its median over the last
                   `window_steps` accepted steps is a spike; 0: only what is not finite is refused
    window_steps:  also the steps among which refusals are counted
    max_skips:     refused steps in a window after which the run goes back to the last checkpoint
                   before them, and past their data
    max_rollbacks: how often from one checkpoint, before the run is given up
    """

    spike_factor: float = 20.0
    window_steps: int = 64
    max_skips: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if self.spike_factor != 0 and self.spike_factor <= 1:
            raise ConfigError(
                f"resilience.guard.spike_factor={self.spike_factor}: must be above 1, or 0 for off"
            )
        for name in ("window_steps", "max_skips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"resilience.guard.{name}={getattr(self, name)}: at least 1")
        if self.max_rollbacks < 0:
            raise ConfigError(
                f"resilience.guard.max_rollbacks={self.max_rollbacks}: must not be negative"
            )


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about faults; without faults it changes no loss curve.

    save_margin_s: seconds before the end of the batch job at which the run saves and asks to be
        requeued, without waiting for a signal; 0 leaves that to signals
    max_fruitless_restarts: restarts of one job that reach no later checkpoint, before it is given
        up; 0: no limit
    hang_s: seconds without a sign of life after which a rank that is in a step is taken to hang,
        or five times its longest step if that is more; the first step of a process, evaluations
        and saves have run.deadline_s. 0: off
    checksum_every_steps: the copies of parameters, moments and averages on different ranks are
        compared after so many steps, and before every save; 0: never
    guard: which steps are refused
    """

    save_margin_s: float = 120.0
    max_fruitless_restarts: int = 3
    hang_s: float = 120.0
    checksum_every_steps: int = 100
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        if self.save_margin_s < 0:
            raise ConfigError(f"resilience.save_margin_s={self.save_margin_s}: must be at least 0")
        if self.hang_s < 0:
            raise ConfigError(f"resilience.hang_s={self.hang_s}: must be at least 0")
        for name in ("max_fruitless_restarts", "checksum_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"resilience.{name}={getattr(self, name)}: must not be negative")
