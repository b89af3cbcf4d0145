"""What all ranks decide together, once in every step, between the backward and the update.

A step whose loss or gradient norm is not finite, or far above what the last steps had, is not
taken: parameters, moments and averages stay as they were, bit for bit, and training goes on with
the next step's data. Where too many steps of a window are refused, the parameters themselves are
suspect: the run goes back (`trainer/resilience/rollback.py`). Every verdict follows from numbers
that are reduced over the ranks and kept in the checkpoint, so all ranks and every resumed run come
to the same one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.resilience.config import GuardConfig
from kinodit.trainer.resilience.rollback import RollBack
from kinodit.trainer.resilience.signals import Request, Signals
from kinodit.trainer.state import GuardState, TrainState
from kinodit.trainer.step import Gate


class Guard:
    """Judges steps, and carries the ranks' wishes to stop in the same small all-reduce.

    request: what the ranks have agreed on; once made, an agreement stands
    state:   what the next verdict depends on
    reason:  why the last step was refused; "" if it was not
    """

    def __init__(
        self, config: GuardConfig, mesh: Mesh, signals: Signals, state: GuardState
    ) -> None:
        self._config, self._mesh, self._signals = config, mesh, signals
        self.request = Request.NONE
        self.state = state
        self.reason = ""
        self._waited_s = 0.0

    def take_wait_s(self) -> float:
        """Seconds that agreeing took since the last call: waiting for ranks, or for the device."""
        taken, self._waited_s = self._waited_s, 0.0
        return taken

    def gate(self, step: int) -> Gate:
        """What decides about step `step`. Collective when called."""
        return partial(self._judge, step)

    def check(self, state: TrainState) -> None:
        """Raise if the steps up to `state` leave no trust in the parameters.

        Raises:
            RollBack: too many steps of the window were refused.
        """
        if self.reason and len(self.state.skips) >= self._config.max_skips:
            first, last = self.state.skips[0], self.state.skips[-1]
            raise RollBack(
                first,
                state.data_step,
                f"{len(self.state.skips)} of the steps {first} to {last} were refused, "
                f"the last because {self.reason}",
            )

    def _judge(self, step: int, losses: Tensor, grad_norm: Tensor) -> bool:
        device = self._mesh.device
        loss = losses.detach().sum().to(device, torch.float64)
        norm = grad_norm.detach().to(device, torch.float64)
        wish = self._signals.request
        measured = torch.stack([loss, norm / self._mesh.world_size])
        wishes = [float(wish is Request.REQUEUE), float(wish is Request.STOP)]
        table = torch.cat(
            [
                torch.nan_to_num(measured, nan=0.0, posinf=0.0, neginf=0.0),
                (~torch.isfinite(measured)).to(torch.float64),
                self._mesh.tensor(wishes, torch.float64),
            ]
        )
        start = time.perf_counter()
        total_loss, mean_norm, bad_losses, bad_norms, requeue, stop = self._mesh.sum(table).tolist()
        self._waited_s += time.perf_counter() - start
        if self.request is Request.NONE:
            self.request = Request.STOP if stop else Request.REQUEUE if requeue else Request.NONE
        if bad_losses:
            self.reason = f"the loss is {self._where(loss)}"
        elif bad_norms:
            self.reason = f"the gradient norm is {self._where(norm)}"
        else:
            self.reason = self._spike(total_loss, mean_norm)
        self.state = self._next(step, total_loss, mean_norm)
        return not self.reason

    def _where(self, value: Tensor) -> str:
        """The value that is not finite, and the ranks that have it. Collective."""
        values = self._mesh.gather_objects(float(value))
        ranks = [rank for rank, found in enumerate(values) if not math.isfinite(found)]
        found = values[ranks[0]] if ranks else math.nan
        if len(ranks) == self._mesh.world_size:
            return f"{found} on every rank"
        return f"{found} on rank {', '.join(map(str, ranks))}"

    def _spike(self, loss: float, norm: float) -> str:
        recent, factor = self.state.recent, self._config.spike_factor
        if factor == 0 or len(recent) < self._config.window_steps:
            return ""
        for name, value, before in (
            ("loss", loss, [entry[0] for entry in recent]),
            ("gradient norm", norm, [entry[1] for entry in recent]),
        ):
            usual = statistics.median(before)
            if value > factor * usual > 0:
                return f"the {name} is {value:.4g}, {value / usual:.0f} times the usual {usual:.4g}"
        return ""

    def _next(self, step: int, loss: float, norm: float) -> GuardState:
        window = self._config.window_steps
        recent: Sequence[tuple[float, float]] = self.state.recent
        skips = [skip for skip in self.state.skips if skip > step - window]
        if self.reason:
            skips.append(step)
        else:
            recent = [*recent, (loss, norm)][-window:]
        num_skipped = self.state.num_skipped + bool(self.reason)
        return GuardState(tuple(recent), tuple(skips), num_skipped)
