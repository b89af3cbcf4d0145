"""What all ranks decide together, once in every step, between the backward and the update."""

from __future__ import annotations

import torch
from torch import Tensor

from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.resilience.signals import Request, Signals


class Guard:
    """Agrees on one verdict per step; one small all-reduce carries everything.

    request: what the ranks have agreed on so far; once made, an agreement stands
    """

    def __init__(self, mesh: Mesh, signals: Signals) -> None:
        self._mesh, self._signals = mesh, signals
        self.request = Request.NONE

    def __call__(self, losses: Tensor, grad_norm: Tensor) -> bool:
        """Whether to update with the step's gradients. Collective."""
        ours = self._signals.request
        wishes = [float(ours is Request.REQUEUE), float(ours is Request.STOP)]
        requeue, stop = self._mesh.sum(
            torch.tensor(wishes, dtype=torch.float64, device=self._mesh.device)
        ).tolist()
        if self.request is Request.NONE:
            self.request = Request.STOP if stop else Request.REQUEUE if requeue else Request.NONE
        return True
