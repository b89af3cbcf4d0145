"""AdamW by torch's fused kernel, over each rank's own parts.

Every operation is elementwise, so the kernel never meets a DTensor: one that it met would think for
seconds about where a list of tensors may lie, in the first step of a run on a mesh of two axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kinodit.trainer.optim.base import Group
from kinodit.trainer.optim.config import OptimConfig
from kinodit.trainer.parallel.parts import local_part, spread


class AdamW:
    """Implements `Optimizer` by torch.optim.AdamW. State: `exp_avg/NAME`, `exp_avg_sq/NAME`."""

    def __init__(self, groups: Sequence[Group], config: OptimConfig) -> None:
        self._groups = groups
        self.adamw = torch.optim.AdamW(
            [
                {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
                for group in groups
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def set_lr(self, lr: float) -> None:
        """See `Optimizer`."""
        for torch_group, group in zip(self.adamw.param_groups, self._groups, strict=True):
            torch_group["lr"] = lr * group.lr_scale

    @torch.no_grad()
    def step(self) -> None:
        """See `Optimizer`."""
        for settings, group in zip(self.adamw.param_groups, self._groups, strict=True):
            updated = [p for p in group.parameters.values() if p.grad is not None]
            states = [self.initialised(parameter) for parameter in updated]
            beta1, beta2 = settings["betas"]
            adamw(
                [local_part(parameter) for parameter in updated],
                [local_part(cast(Tensor, parameter.grad)) for parameter in updated],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=settings["lr"],
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                maximize=False,
            )
        self.skip()

    def skip(self) -> None:
        """See `Optimizer`."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        tensors: dict[str, Tensor] = {}
        for group in self._groups:
            for name, parameter in group.parameters.items():
                state = self.initialised(parameter)
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{moment}/{name}"] = state[moment]
        return tensors

    def set_num_steps(self, num_steps: int) -> None:
        """See `Optimizer`."""
        for group in self._groups:
            for parameter in group.parameters.values():
                self.initialised(parameter)["step"].fill_(float(num_steps))

    def tensors(self) -> list[Tensor]:
        """See `Optimizer`."""
        return [tensor for state in self.adamw.state.values() for tensor in state.values()]

    def initialised(self, parameter: Tensor) -> dict[str, Any]:
        """torch's state of a parameter, as zeros if there is none yet."""
        state: dict[str, Any] = self.adamw.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = spread(torch.zeros_like(local_part(parameter)), parameter)
        return state
