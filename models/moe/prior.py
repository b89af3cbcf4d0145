"""The diffusion prior loss: units of experts for ranges of the noise level, shared where they meet.

Switch-DiT (arXiv 2403.09176), section 3.3, after DTR's task masks (arXiv 2310.07138): neighbouring
noise levels, its tasks, should share experts, and the more so the nearer they are to the data.
Which expert takes which unit of the prior is left to the routers, by a matching (section 3.4).

Shape legend: N tokens, E experts of a layer, L layers, U = L E units, G tasks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.models.libraries import import_extra

NUM_TASKS = 1000
"""Noise levels at which routers are compared with the prior; the paper's diffusion has as many."""


def first_unit(level_t: Tensor, num_units: int, width: int) -> Tensor:
    """[...] -> [...]: the first of the `width` neighbouring units that noise level t activates.

    round(t^4 (U - width)): levels near the data share their units, those near noise part.
    """
    return (level_t.double().pow(4) * (num_units - width)).round()


def prior_shares(level_t: Tensor, unit: Tensor, num_units: int, width: int) -> Tensor:
    """[N] levels and [E], the unit of each expert -> [N, E]: what the prior gives them.

    Over all layers they sum to 1 for each token.
    """
    first, place = first_unit(level_t, num_units, width).unsqueeze(-1), unit.double().round()
    return ((place >= first) & (place < first + width)).double() / width


def divergence(shares: Tensor, prior: Tensor) -> Tensor:
    """Scalar: the sum over tokens of these layers' part of the Jensen-Shannon divergence, in nats.

    shares, prior: [N, E]. Over all experts of all layers both sum to 1; the divergence is a sum
    over experts, so that each layer adds its own part.
    """
    prior = prior.to(shares.dtype)
    wide = shares.clamp(min=torch.finfo(shares.dtype).tiny)
    both = (wide + prior).log()
    ours = wide * (math.log(2) + wide.log() - both)
    theirs = torch.xlogy(prior, prior) + prior * (math.log(2) - both)
    return (ours + theirs).sum() / 2


def task_levels(device: torch.device) -> Tensor:
    """[G] float32: the noise levels of the tasks."""
    return torch.linspace(0, 1, NUM_TASKS, dtype=torch.float32, device=device)


def matched_units(masks: NDArray[np.uint8], width: int) -> NDArray[np.int64]:
    """[U, G] -> [U]: the unit of each expert such that prior and routers differ least.

    masks: 1 where the router of the expert's layer sends a task's tokens to it. Differences are
           counted over all tasks, as in section 3.4.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    num_units = len(masks)
    first = first_unit(task_levels(torch.device("cpu")), num_units, width).numpy()
    unit = np.arange(num_units)[:, None]
    prior = ((unit >= first) & (unit < first + width)).astype(np.float64)
    routed = masks.astype(np.float64)
    cost = routed.sum(1)[:, None] + prior.sum(1)[None] - 2 * routed @ prior.T
    _, found = solver().linear_sum_assignment(cost)
    unit_of: NDArray[np.int64] = found
    return unit_of


def solver() -> Any:
    """The library that finds the cheapest assignment.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    return import_extra("scipy.optimize", "moe", "router.balance = prior")
