"""What an engine asks of an optimizer, and how parameters are grouped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kinodit.models.errors import ConfigError
from kinodit.trainer.optim.config import OptimConfig, is_vector


class Optimizer(Protocol):
    """Updates parameters, which may be DTensors, from their gradients. All ranks call alike."""

    def set_lr(self, lr: float) -> None:
        """Set the rate of this step, before each group's scale."""
        ...

    def step(self) -> None:
        """Update parameters from their gradients and drop the gradients."""
        ...

    def skip(self) -> None:
        """Drop the gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it remembers, by canonical name: `MOMENT/NAME`; sharded as the parameter.

        Before the first step it is created as zeros. Loading writes into these tensors in place.
        """
        ...

    def set_num_steps(self, num_steps: int) -> None:
        """Set the count of updates done, which bias corrections use."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps, `state` and counts: for those who count bytes."""
        ...


@dataclass
class Group:
    """Parameters with one weight decay and one factor of the rate, by canonical name."""

    weight_decay: float
    lr_scale: float
    parameters: dict[str, nn.Parameter]


def group_parameters(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[Group]:
    """Groups of the parameters that require gradients, in the order of their first ones.

    Raises:
        ConfigError: a rule that matches no parameter.
    """
    groups: dict[tuple[float, float], Group] = {}
    used: set[str] = set()
    rules, example = list(config.rules.values()), ""
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        example = example or name
        # What ZeRO has partitioned has no shape of its own any more.
        num_dims = len(getattr(parameter, "ds_shape", parameter.shape))
        decay = 0.0 if is_vector(name, num_dims) else config.weight_decay
        rule = next((r for r in rules if re.search(r.pattern, name)), None)
        if rule is not None:
            used.add(rule.pattern)
        key = (rule.weight_decay if rule else decay, rule.lr_scale if rule else 1.0)
        groups.setdefault(key, Group(*key, {})).parameters[name] = parameter
    unused = [rule.pattern for rule in rules if rule.pattern not in used]
    if unused:
        raise ConfigError(
            f"optim.rules: pattern {unused[0]!r} matches no parameter that an earlier rule left; "
            f"names look like {example!r}"
        )
    return list(groups.values())
