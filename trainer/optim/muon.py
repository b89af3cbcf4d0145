"""Muon: momentum of hidden matrices, orthogonalised; AdamW for everything else.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the update of a
matrix is the nearest semi-orthogonal one to its Nesterov momentum, by Newton and Schulz's
iteration. Scaled by 0.2 sqrt(max(rows, columns)) its entries are as large as AdamW's, so that both
share a rate and a weight decay (Liu et al., arXiv 2502.16982, section 2.2, equation 4).

A matrix that is split is put together for the iteration, which runs in the parameter's number
format, so that every layout makes the update that one process makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kinodit.models.errors import ConfigError
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.optim.base import Group
from kinodit.trainer.optim.config import MuonConfig
from kinodit.trainer.optim.exchange import on_whole
from kinodit.trainer.parallel.parts import local_part, spread

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic: the steepest at 0 whose iterates keep singular values near 1."""
RMS = 0.2
"""Of AdamW's updates (Liu et al., section 2.2)."""
TINY = 1e-7


def orthogonalise(matrix: Tensor, num_iterations: int) -> Tensor:
    """U V^T, nearly, of `matrix` = U S V^T [rows, columns]: singular values between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrix / (torch.linalg.vector_norm(matrix) + TINY)
    if tall := x.shape[0] > x.shape[1]:
        x = x.mT
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Implements `Optimizer`. State: `momentum/NAME` of its matrices, and AdamW's of the others."""

    def __init__(self, groups: Sequence[Group], config: MuonConfig) -> None:
        """Raise ConfigError if no parameter is left to it."""
        self._config = config
        self._groups: list[Group] = []
        others: list[Group] = []
        for group in groups:
            mine: dict[str, nn.Parameter] = {}
            rest: dict[str, nn.Parameter] = {}
            for name, parameter in group.parameters.items():
                (mine if config.takes(name, parameter.ndim) else rest)[name] = parameter
            for kept, chosen in ((self._groups, mine), (others, rest)):
                if chosen:
                    kept.append(Group(group.weight_decay, group.lr_scale, chosen))
        if not self._groups:
            raise ConfigError(
                f"optim.adamw={config.adamw!r} leaves no matrix to Muon: make it match fewer "
                "names, or set optim.name=adamw"
            )
        self._adamw = AdamW(others, config) if others else None
        self._lr = config.lr
        self._momentum: dict[str, Tensor] = {}

    def set_lr(self, lr: float) -> None:
        """See `Optimizer`."""
        self._lr = lr
        if self._adamw is not None:
            self._adamw.set_lr(lr)

    @torch.no_grad()
    def step(self) -> None:
        """See `Optimizer`."""
        named = [(name, p) for group in self._groups for name, p in group.parameters.items()]
        directions = [self._direction(name, parameter) for name, parameter in named]
        parameters = [parameter for _, parameter in named]
        updates = iter(on_whole(directions, parameters, self._orthogonal))
        for group in self._groups:
            lr = self._lr * group.lr_scale
            for parameter in group.parameters.values():
                local = local_part(parameter)
                local.mul_(1 - lr * group.weight_decay)
                local.add_(next(updates), alpha=-lr * RMS * math.sqrt(max(parameter.shape)))
        if self._adamw is not None:
            self._adamw.step()
        self.skip()

    def skip(self) -> None:
        """See `Optimizer`."""
        for group in self._groups:
            for parameter in group.parameters.values():
                parameter.grad = None
        if self._adamw is not None:
            self._adamw.skip()

    def state(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        tensors = {
            f"momentum/{name}": self._buffer(name, parameter)
            for group in self._groups
            for name, parameter in group.parameters.items()
        }
        return tensors | (self._adamw.state() if self._adamw is not None else {})

    def set_num_steps(self, num_steps: int) -> None:
        """See `Optimizer`."""
        if self._adamw is not None:
            self._adamw.set_num_steps(num_steps)

    def tensors(self) -> list[Tensor]:
        """See `Optimizer`."""
        return [*self._momentum.values(), *(self._adamw.tensors() if self._adamw else [])]

    def _direction(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Nesterov's momentum of this rank's part, after this step's gradient."""
        momentum, buffer = self._config.momentum, local_part(self._buffer(name, parameter))
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = local_part(parameter.grad)
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp_(buffer, momentum)

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        return orthogonalise(matrix, self._config.num_iterations)

    def _buffer(self, name: str, parameter: nn.Parameter) -> Tensor:
        if name not in self._momentum:
            self._momentum[name] = spread(torch.zeros_like(local_part(parameter)), parameter)
        return self._momentum[name]
