"""What is counted of a layer's routing, additive over packs, micro-batches and processes.

Shape legend: N tokens, E experts, k experts that a token asks for, S streams, B bins of the noise
level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_BINS = 10
"""Equal bins of the noise level t."""

NUM_OTHERS = 4
"""Numbers of a tally that belong to no expert; see `Load`."""


@dataclass(frozen=True)
class Sums:
    """What a tally has counted in some steps. values: [size]; streams: S names of token streams."""

    values: Tensor
    streams: tuple[str, ...]

    def __add__(self, other: Sums) -> Sums:
        return replace(self, values=self.values + other.values)


class Tally:
    """Sums since they were last taken, in float64, on the device that counts.

    One row of numbers, so that those of many layers and ranks are summed in one message.
    """

    def __init__(self, num_experts: int, streams: Sequence[str] = ("",)) -> None:
        self.num_experts, self.streams = num_experts, tuple(streams)
        self._sums: Tensor | None = None

    @property
    def size(self) -> int:
        """How many numbers."""
        return self._num_cells + self.num_experts + NUM_OTHERS

    @property
    def _num_cells(self) -> int:
        return len(self.streams) * NUM_BINS * self.num_experts

    def count(
        self,
        index: Tensor,
        kept: Tensor | None,
        shares: Tensor,
        squares: Tensor,
        level_t: Tensor,
        stream: Tensor | None = None,
    ) -> Tensor:
        """[size] of these tokens.

        index: [N, k]; kept: [N, k] bool, which of them count, None: all; shares: [N, E], that sum
        to 1; squares: scalar, their z-losses; level_t: [N]; stream: [N], None: all of the first
        """
        bins = (level_t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        if stream is not None:
            bins = bins + stream * NUM_BINS
        cells = (bins.unsqueeze(-1) * self.num_experts + index).flatten()
        counts = cells.new_zeros(self._num_cells)
        ones = torch.ones_like(index) if kept is None else kept.long()
        counts.index_add_(0, cells, ones.flatten())
        dropped = (ones.sum(-1) == 0).sum()
        wide = shares.double()
        entropy = -torch.xlogy(wide, wide).sum()
        rest = torch.stack([dropped.double(), entropy, squares.double(), entropy * 0])
        return torch.cat([counts.double(), wide.sum(0), rest])

    def by_expert(self, sums: Tensor) -> Tensor:
        """[E] choices, of the `sums` [size] of this or of other ranks, on their device."""
        return sums[: self._num_cells].view(-1, self.num_experts).sum(0)

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

    streams:     S names
    counts:      [S B][E] choices by stream, bin of the noise level and expert
    shares:      [E] sums of the scores' shares
    dropped:     tokens that went to no expert
    entropy:     sum over tokens of the entropy of their shares, in nats
    squares:     sum over tokens of the squared log-sum-exp of their logits
    gradient:    sum over steps of the squared norm of the router's gradient
    """

    streams: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    dropped: float
    entropy: float
    squares: float
    gradient: float

    @classmethod
    def of(cls, sums: list[float], streams: Sequence[str] = ("",)) -> Load:
        """From the numbers of a `Tally`."""
        num_experts = (len(sums) - NUM_OTHERS) // (len(streams) * NUM_BINS + 1)
        cells = len(streams) * NUM_BINS * num_experts
        counts = [tuple(sums[i : i + num_experts]) for i in range(0, cells, num_experts)]
        shares = tuple(sums[cells : cells + num_experts])
        return cls(tuple(streams), tuple(counts), shares, *sums[-NUM_OTHERS:])

    @property
    def by_expert(self) -> list[float]:
        """[E] choices."""
        return [sum(column) for column in zip(*self.counts, strict=True)]

    @property
    def by_bin(self) -> list[list[float]]:
        """[B][E] choices by bin of the noise level."""
        rows = [self.counts[first::NUM_BINS] for first in range(NUM_BINS)]
        return [[sum(column) for column in zip(*row, strict=True)] for row in rows]

    @property
    def by_stream(self) -> dict[str, list[float]]:
        """Stream -> [E] choices."""
        parts = [self.counts[i : i + NUM_BINS] for i in range(0, len(self.counts), NUM_BINS)]
        sums = [[sum(column) for column in zip(*part, strict=True)] for part in parts]
        return dict(zip(self.streams, sums, strict=True))

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
