"""AdamW with rules for groups of parameters, and learning-rate schedules as pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class ParameterRule:
    """Parameters whose name contains a match of `pattern` (a regular expression).

    lr_scale multiplies the schedule's rate; weight_decay replaces the optimizer's; the first rule
    that matches a name decides.
    """

    pattern: str = ""
    lr_scale: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

    Vectors (norms, biases) have no weight decay unless a rule says otherwise.
    max_grad_norm: gradients are scaled so that their global norm is at most this; 0 = never
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    rules: dict[str, ParameterRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr}: must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)}: each must be in [0, 1)")
        if self.max_grad_norm < 0:
            raise ConfigError(f"optim.max_grad_norm={self.max_grad_norm}: must not be negative")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a factor of optim.lr.

    Linear warm-up over `warmup_steps`; then constant, cosine or linear to `final_factor` at the
    last step, or wsd: constant, then linear over the last `decay_steps` (Hu et al., arXiv
    2404.06395, section 4).
    """

    name: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}: "
                "must not be negative"
            )

    def factor(self, step: int, num_steps: int) -> float:
        """Factor for step `step` (0-based) of `num_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        start = num_steps - self.decay_steps if self.name == "wsd" else self.warmup_steps
        if step < start:
            return 1.0
        progress = min(1.0, (step - start) / max(1, num_steps - 1 - start))
        if self.name == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1.0 + (self.final_factor - 1.0) * progress


@dataclass
class Optimizer:
    """AdamW over named parameters. `lr_scales` holds each group's factor."""

    adamw: torch.optim.AdamW
    names: Mapping[int, str]
    lr_scales: list[float] = field(default_factory=list)

    def set_lr(self, lr: float) -> None:
        """Set the rate of this step, before each group's scale."""
        for group, scale in zip(self.adamw.param_groups, self.lr_scales, strict=True):
            group["lr"] = lr * scale

    def step(self) -> None:
        """Update parameters from their gradients and drop the gradients."""
        self.adamw.step()
        self.skip()

    def skip(self) -> None:
        """Drop the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments by canonical name: `exp_avg/NAME`, `exp_avg_sq/NAME`; sharded as the parameter.

        Before the first step the moments are created as zeros, so that they can be loaded into.
        """
        tensors: dict[str, Tensor] = {}
        for parameter in self._parameters():
            state = self._initialised(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{self.names[id(parameter)]}"] = state[moment]
        return tensors

    def set_num_steps(self, num_steps: int) -> None:
        """Set the count of updates done, which AdamW's bias correction uses."""
        for parameter in self._parameters():
            self._initialised(parameter)["step"].fill_(float(num_steps))

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.adamw.param_groups for p in group["params"]]

    def _initialised(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.adamw.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """AdamW over the parameters of `model` that require gradients.

    Raises:
        ConfigError: a rule that matches no parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    names: dict[int, str] = {}
    used: set[str] = set()
    rules = list(config.rules.values())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names[id(parameter)] = name
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        rule = next((r for r in rules if re.search(r.pattern, name)), None)
        if rule is not None:
            used.add(rule.pattern)
        scale = rule.lr_scale if rule else 1.0
        groups.setdefault((rule.weight_decay if rule else decay, scale), []).append(parameter)
    unused = [rule.pattern for rule in rules if rule.pattern not in used]
    if unused:
        raise ConfigError(
            f"optim.rules: pattern {unused[0]!r} matches no parameter that an earlier rule left; "
            f"names look like {next(iter(names.values()))!r}"
        )
    adamw = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for (decay, _), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    return Optimizer(adamw, names, [scale for _, scale in groups])
