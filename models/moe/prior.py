"""The diffusion prior loss: units of experts for ranges of the noise level, shared where they meet.

Switch-DiT (arXiv 2403.09176), section 3.3, after DTR's task masks (arXiv 2310.07138): neighbouring
noise levels, its tasks, should share experts, and the more so the noisier they are. Which expert
takes which unit of the prior is left to the routers, by a matching (section 3.4).

Shape legend: N tokens, E experts of a layer, L layers, U = L E units, G tasks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """
    num_units = len(masks)
    first = first_unit(task_levels(torch.device("cpu")), num_units, width).numpy()
    unit = np.arange(num_units)[:, None]
    prior = ((unit >= first) & (unit < first + width)).astype(np.float64)
    routed = masks.astype(np.float64)
    cost = routed.sum(1)[:, None] + prior.sum(1)[None] - 2 * routed @ prior.T
    return assignment(cost)


def assignment(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n, n] -> [n]: the column of each row such that the sum of their costs is the least.

    By shortest augmenting paths (Jonker and Volgenant 1987), row after row, in O(n^3).
    """
    size = len(cost)
    # Row and column `size` stand for "none"; prices of rows and columns never exceed a cost.
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.full(size + 1, size)
    for row in range(size):
        row_of[size], column = row, size
        shortest, before = np.full(size, np.inf), np.full(size, size)
        is_done = np.zeros(size + 1, dtype=bool)
        while row_of[column] != size:
            is_done[column] = True
            here = row_of[column]
            length = cost[here] - row_price[here] - column_price[:size]
            is_open = ~is_done[:size]
            is_shorter = is_open & (length < shortest)
            shortest[is_shorter], before[is_shorter] = length[is_shorter], column
            nearest = int(np.where(is_open, shortest, np.inf).argmin())
            step = shortest[nearest]
            row_price[row_of[is_done]] += step
            column_price[is_done] -= step
            shortest[is_open] -= step
            column = nearest
        while column != size:
            row_of[column], column = row_of[before[column]], before[column]
    found = np.empty(size, dtype=np.int64)
    found[row_of[:size]] = np.arange(size)
    return found
