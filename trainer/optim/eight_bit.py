"""AdamW with moments of 8 bits, by torchao, over each rank's own parts.

Every operation is elementwise or within a block of 256 numbers of a row, so torchao never meets a
DTensor. What is saved of a moment are its codes and its scales, each sharded as the parameter is:
blocks do not depend on the layout, so that a run goes on from them on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinodit.models.errors import ConfigError
from kinodit.models.libraries import import_extra
from kinodit.trainer.optim.base import Group
from kinodit.trainer.optim.config import QUANTISED_BLOCK, AdamW8bitConfig
from kinodit.trainer.parallel.parts import local_part, spread

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name -> whether it has a sign."""


@dataclass
class _Slot:
    """A parameter and what torchao sees of it: this rank's part, under the same memory."""

    name: str
    parameter: nn.Parameter
    seen: nn.Parameter
    saved: dict[str, Tensor]


class AdamW8bit:
    """Implements `Optimizer` by torchao.optim.AdamW8bit.

    State: `exp_avg/NAME` and `exp_avg_sq/NAME`, or `MOMENT_codes/NAME` (uint8, as the parameter)
    and `MOMENT_scale/NAME` (float32 [rows, columns / 256]) where they take 8 bits.
    """

    def __init__(self, groups: Sequence[Group], config: AdamW8bitConfig) -> None:
        """Raise ConfigError where it cannot work; see `_check`."""
        _check(groups, config)
        self._library = import_extra("torchao.optim", "torchao", "optim.name=adamw8bit")
        self._groups, self._config = groups, config
        self._maps: dict[bool, Tensor] = {}
        self._slots = [
            [
                _Slot(name, parameter, nn.Parameter(local_part(parameter)), {})
                for name, parameter in group.parameters.items()
            ]
            for group in groups
        ]
        self._optimizer = self._library.AdamW8bit(
            [
                {"params": [slot.seen for slot in slots], "weight_decay": group.weight_decay}
                for slots, group in zip(self._slots, groups, strict=True)
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            block_size=QUANTISED_BLOCK,
        )
        for slot in self._all():
            self._create(slot)

    def set_lr(self, lr: float) -> None:
        """See `Optimizer`."""
        for torch_group, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            torch_group["lr"].fill_(lr * group.lr_scale)

    @torch.no_grad()
    def step(self) -> None:
        """See `Optimizer`."""
        for slot in self._all():
            # FSDP2 may have moved its shards when the model first ran.
            slot.seen.data = local_part(slot.parameter)
            gradient = slot.parameter.grad
            # A rank may hold nothing of a small parameter; torchao cannot update nothing.
            has_some = gradient is not None and slot.seen.numel() > 0
            slot.seen.grad = local_part(gradient) if has_some else None
        if next(self._all()).seen.is_cuda:
            self._optimizer.step()
        else:
            self._step_eagerly()
        self.skip()

    def _step_eagerly(self) -> None:
        """What torchao's step does, without the compiler, which needs one for C++ on a CPU."""
        for group in self._optimizer.param_groups:
            for seen in group["params"]:
                if seen.grad is None:
                    continue
                state = self._optimizer.state[seen]
                state["step"] += 1
                self._library.adam.single_param_adam(
                    seen.detach(),
                    seen.grad,
                    state["step"],
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    None,
                    group["lr"],
                    *group["betas"],
                    group["weight_decay"],
                    group["eps"],
                    True,
                    False,
                )

    def skip(self) -> None:
        """See `Optimizer`."""
        for slot in self._all():
            slot.parameter.grad = slot.seen.grad = None

    def state(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        return {f"{key}/{slot.name}": x for slot in self._all() for key, x in slot.saved.items()}

    def set_num_steps(self, num_steps: int) -> None:
        """See `Optimizer`."""
        for slot in self._all():
            self._optimizer.state[slot.seen]["step"].fill_(float(num_steps))

    def tensors(self) -> list[Tensor]:
        """See `Optimizer`."""
        steps = [self._optimizer.state[slot.seen]["step"] for slot in self._all()]
        return [*self.state().values(), *self._maps.values(), *steps]

    def _all(self) -> Any:
        return (slot for slots in self._slots for slot in slots)

    def _create(self, slot: _Slot) -> None:
        """Moments of zero, in torchao's state and in ours, which share their memory."""
        local, state = slot.seen.detach(), self._optimizer.state[slot.seen]
        state["step"] = torch.tensor(0.0)
        quantised = self._config.quantises(tuple(slot.parameter.shape))
        for moment, signed in MOMENTS.items():
            if not quantised or local.numel() == 0:
                state[moment] = torch.zeros_like(local)
            if not quantised:
                slot.saved[moment] = spread(state[moment], slot.parameter)
                continue
            codes = torch.zeros_like(local, dtype=torch.uint8)
            scale = local.new_zeros(local.shape[0], local.shape[1] // QUANTISED_BLOCK)
            if local.numel():
                state[moment] = self._library.subclass_8bit.OptimState8bit(
                    codes, scale.view(-1), self._map(signed, local.device), signed, local.dtype
                )
            slot.saved[f"{moment}_codes"] = spread(codes, slot.parameter)
            slot.saved[f"{moment}_scale"] = spread(
                scale, slot.parameter, _scales_of(slot.parameter)
            )

    def _map(self, signed: bool, device: torch.device) -> Tensor:
        """What the 256 codes stand for: one table for all parameters."""
        if signed not in self._maps:
            library = self._library.subclass_8bit
            values = library.get_qmap_signed() if signed else library.get_qmap_unsigned()
            self._maps[signed] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._maps[signed]


def _scales_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter's scales: one for each block of a row."""
    return (*parameter.shape[:-1], parameter.shape[-1] // QUANTISED_BLOCK)


def _check(groups: Sequence[Group], config: AdamW8bitConfig) -> None:
    """Refuse what torchao cannot do, or would do without saying that it does nothing.

    Raises:
        ConfigError: parameters that are not float32; none is large enough; rows that tp cuts
            within a block.
    """
    named = [(name, p) for group in groups for name, p in group.parameters.items()]
    wrong = next((p.dtype for _, p in named if p.dtype != torch.float32), None)
    if wrong is not None:
        raise ConfigError(
            f"optim.name=adamw8bit with parameters in {str(wrong).partition('.')[2]}: torchao "
            "computes the update in float32: set precision.params=float32, or optim.name=adamw"
        )
    quantised = [(name, p) for name, p in named if config.quantises(tuple(p.shape))]
    if not quantised:
        raise ConfigError(
            "optim.name=adamw8bit would leave every moment as it is: it takes matrices of at "
            "least 4096 numbers in rows of a multiple of 256, and this model has none: set "
            "optim.name=adamw"
        )
    for name, parameter in quantised:
        columns = local_part(parameter).shape[1]
        if columns % QUANTISED_BLOCK:
            raise ConfigError(
                f"optim.name=adamw8bit keeps a scale for {QUANTISED_BLOCK} numbers of a row, but "
                f"parallel.tp leaves {columns} columns of {name} {list(parameter.shape)} on a "
                "rank: lower parallel.tp, or set optim.name=adamw"
            )
