"""The samples of a step into packs: balanced by cost, within budgets, in rounds.

A *round* is `packs_per_step` packs, which ranks compute side by side: as many forward passes as a
rank has packs of it. Ranks of one sharded model wait for each other in every pass, so the packs of
a round should cost alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray

Packs = list[list[int]]
"""Samples of each pack, as their numbers among those given."""


@dataclass(frozen=True)
class Budget:
    """What packs are bounded by.

    num_packs: packs of a round
    tokens:    most tokens of a pack: its memory
    cost:      most cost of a pack; None bounds it by its tokens alone
    """

    num_packs: int
    tokens: int
    cost: int | None = None

    @property
    def most_cost(self) -> float:
        """`cost` as a number to compare with."""
        return float("inf") if self.cost is None else self.cost


def cost_of(tokens: NDArray[np.int64], parity_tokens: int) -> NDArray[np.int64]:
    """[n] L + L^2 / `parity_tokens` of samples of L tokens, in whole numbers.

    That is the FLOPs a * L + b * L^2 of a sample in units of a, with `parity_tokens` = a / b: the
    length at which attention takes as many as everything else. 0: attention counts nothing.
    """
    if not parity_tokens:
        return tokens
    return tokens + tokens * tokens // parity_tokens


def balanced(costs: Sequence[int], num_packs: int) -> Packs:
    """Longest first, each into the emptiest pack; ties go by number and by pack.

    Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969.
    """
    longest_first = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    if num_packs == 1:
        return [longest_first]
    packs: Packs = [[] for _ in range(num_packs)]
    # The emptiest first: by load, by number of items, by number of the pack.
    waiting = [(0, 0, pack) for pack in range(num_packs)]
    for item in longest_first:
        load, count, pack = waiting[0]
        packs[pack].append(item)
        heapreplace(waiting, (load + costs[item], count + 1, pack))
    return packs


def within_budget(tokens: NDArray[np.int64], costs: NDArray[np.int64], budget: Budget) -> Packs:
    """As few rounds as hold all samples, every pack within the budgets, costs balanced.

    Packs are in the order of their costs, largest first: those that are computed side by side cost
    about the same, however many ranks there are. Each sample must be within the budgets itself.
    """
    rounds = max(1, -(-int(tokens.sum()) // (budget.num_packs * budget.tokens)))
    if budget.cost is not None:
        rounds = max(rounds, -(-int(costs.sum()) // (budget.num_packs * budget.cost)))
    while (packs := _try_fill(tokens, costs, rounds * budget.num_packs, budget)) is None:
        rounds += 1
    loads = [int(costs[pack].sum()) for pack in packs]
    order = sorted(range(len(packs)), key=lambda p: (-loads[p], p))
    return [packs[p] for p in order]


def _try_fill(
    tokens: NDArray[np.int64], costs: NDArray[np.int64], num_packs: int, budget: Budget
) -> Packs | None:
    """Longest first, each into the emptiest of the packs that have room; None if none has."""
    length, load = np.zeros(num_packs, np.int64), np.zeros(num_packs, np.float64)
    packs: Packs = [[] for _ in range(num_packs)]
    for item in np.lexsort((np.arange(len(costs)), -costs)).tolist():
        room = (length + tokens[item] <= budget.tokens) & (load + costs[item] <= budget.most_cost)
        pack = int(np.where(room, load, np.inf).argmin())
        if not room[pack]:
            return None
        length[pack] += tokens[item]
        load[pack] += costs[item]
        packs[pack].append(item)
    return packs


def by_class(
    classes: Sequence[object], tokens: NDArray[np.int64], costs: NDArray[np.int64], budget: Budget
) -> list[Packs]:
    """Rounds of one class each: all packs of a round hold samples of one size, equally many.

    Of the samples of a class, whole rounds of packs as full as the budgets allow; the rest is
    spread over one more round, in which packs differ by one sample and may be empty.

    `classes` are hashable, one for each sample; samples of a class have the same tokens and costs.
    """
    members: dict[object, list[int]] = {}
    for item, name in enumerate(classes):
        members.setdefault(name, []).append(item)
    rounds: list[Packs] = []
    for items in members.values():
        fit = int(budget.tokens // tokens[items[0]])
        if budget.cost is not None:
            fit = min(fit, int(budget.cost // costs[items[0]]))
        whole = fit * budget.num_packs
        for start in range(0, len(items), whole):
            part = items[start : start + whole]
            rounds.append([part[pack :: budget.num_packs] for pack in range(budget.num_packs)])
    return rounds


def split_rounds(rounds: list[Packs], count: int) -> list[Packs]:
    """At least `count` rounds: the fullest are halved, sample by sample, while there are fewer.

    There must be as many samples as that.
    """
    rounds = list(rounds)
    while len(rounds) < count:
        fullest = max(range(len(rounds)), key=lambda r: (sum(map(len, rounds[r])), -r))
        items = sorted(item for pack in rounds[fullest] for item in pack)
        num_packs, middle = len(rounds[fullest]), len(items) // 2
        assert middle, "fewer samples than rounds"
        rounds[fullest : fullest + 1] = [
            [part[pack::num_packs] for pack in range(num_packs)]
            for part in (items[:middle], items[middle:])
        ]
    return rounds
