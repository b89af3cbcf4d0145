"""What is counted of a layer's routing, additive over packs, micro-batches and processes.

Shape legend: N tokens, E experts, k experts that a token asks for, B bins of the noise level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 10
"""Equal bins of the noise level t."""


class Tally:
    """Sums since they were last taken, in float64, on the device that counts.

    One row of numbers, so that those of many layers and ranks are summed in one message.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._sums: Tensor | None = None

    @property
    def size(self) -> int:
        """How many numbers."""
        return NUM_BINS * self.num_experts + self.num_experts + 3

    def count(
        self,
        index: Tensor,
        kept: Tensor | None,
        shares: Tensor,
        squares: Tensor,
        level_t: Tensor,
    ) -> Tensor:
        """[size] of these tokens.

        index: [N, k]; kept: [N, k] bool, which of them count, None: all; shares: [N, E], that sum
        to 1; squares: scalar, their z-losses; level_t: [N]
        """
        bins = (level_t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        cells = (bins.unsqueeze(-1) * self.num_experts + index).flatten()
        counts = cells.new_zeros(NUM_BINS * self.num_experts)
        ones = torch.ones_like(index) if kept is None else kept.long()
        counts.index_add_(0, cells, ones.flatten())
        dropped = (ones.sum(-1) == 0).sum()
        wide = shares.double()
        entropy = -torch.xlogy(wide, wide).sum()
        rest = torch.stack([dropped.double(), entropy, squares.double()])
        return torch.cat([counts.double(), wide.sum(0), rest])

    def by_expert(self, sums: Tensor) -> Tensor:
        """[E] choices, of the `sums` [size] of this or of other ranks, on their device."""
        return sums[: NUM_BINS * self.num_experts].view(NUM_BINS, -1).sum(0)

    def add(self, counted: Tensor) -> None:
        """Add what `count` made, [size]."""
        self._sums = counted if self._sums is None else self._sums + counted

    def take(self, device: torch.device) -> Tensor:
        """The sums, [size]; starts anew."""
        sums, self._sums = self._sums, None
        if sums is None:
            return torch.zeros(self.size, dtype=torch.float64, device=device)
        return sums


@dataclass(frozen=True)
class Load:
    """The sums of one layer over all tokens of some steps, on the host.

    counts:      [B][E] choices by bin of the noise level and expert
    shares:      [E] sums of the scores' shares
    dropped:     tokens that went to no expert
    entropy:     sum over tokens of the entropy of their shares, in nats
    squares:     sum over tokens of the squared log-sum-exp of their logits
    """

    counts: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    dropped: float
    entropy: float
    squares: float

    @classmethod
    def of(cls, sums: list[float]) -> Load:
        """From the numbers of a `Tally`."""
        num_experts = (len(sums) - 3) // (NUM_BINS + 1)
        cells = NUM_BINS * num_experts
        counts = [tuple(sums[i : i + num_experts]) for i in range(0, cells, num_experts)]
        shares = tuple(sums[cells : cells + num_experts])
        return cls(tuple(counts), shares, *sums[-3:])

    @property
    def by_expert(self) -> list[float]:
        """[E] choices."""
        return [sum(column) for column in zip(*self.counts, strict=True)]

    @property
    def num_tokens(self) -> float:
        """Tokens that were routed."""
        return sum(self.shares)

    @property
    def violation(self) -> float:
        """The largest load over the mean, less 1 (MaxVio of arXiv 2408.15664, equation 4)."""
        loads = self.by_expert
        mean = sum(loads) / len(loads)
        return max(loads) / mean - 1 if mean else 0.0
