"""AdamW by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinodit.trainer.optim.base import Group
from kinodit.trainer.optim.config import OptimConfig


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

    def step(self) -> None:
        """See `Optimizer`."""
        self.adamw.step()
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
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
