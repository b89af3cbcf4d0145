"""From a recipe's choice to an optimizer, and the bytes that it will hold."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.optim.base import Optimizer, group_parameters
from kinodit.trainer.optim.config import (
    QUANTISED_BLOCK,
    AdamW8bitConfig,
    MuonConfig,
    OptimConfig,
)
from kinodit.trainer.optim.eight_bit import AdamW8bit
from kinodit.trainer.optim.muon import Muon

STEP_BYTES = 4
"""Updates are counted in a float32 scalar for each parameter."""


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """The chosen optimizer over the parameters of `model` that require gradients.

    Raises:
        ConfigError: a rule that matches no parameter, or a choice that cannot work here.
        MissingExtraError: the choice's library is not installed.
    """
    groups = group_parameters(config, model.named_parameters())
    if isinstance(config, MuonConfig):
        return Muon(groups, config)
    if isinstance(config, AdamW8bitConfig):
        return AdamW8bit(groups, config)
    return AdamW(groups, config)


def optimizer_bytes(
    config: OptimConfig, parts: Iterable[tuple[str, tuple[int, ...], int]], item: int
) -> int:
    """Bytes of an optimizer's state on a rank at rest.

    parts: (name, whole shape, how many of its numbers are here) of each parameter; numbers have
    `item` bytes.
    """
    total, quantises = 0, False
    for name, shape, own in parts:
        if isinstance(config, MuonConfig) and config.takes(name, len(shape)):
            total += own * item
        elif isinstance(config, AdamW8bitConfig) and config.quantises(shape):
            quantises = True
            total += 2 * (own + own // QUANTISED_BLOCK * 4) + STEP_BYTES
        else:
            total += 2 * own * item + STEP_BYTES
    # The values of the codes, with and without a sign.
    return total + quantises * 2 * 256 * 4
