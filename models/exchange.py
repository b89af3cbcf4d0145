"""The seams at which several processes may share one model's tokens and matrices.

A model computes norms, gates and heads on *its own* tokens, and queries, keys, values and
feed-forwards on the tokens it *sees*. In one process these are the same, and no exchange is set.
Under tensor parallelism with sequence parallelism (Korthikanti et al., arXiv 2205.05198, section
4.2) a process sees the tokens of its whole group through its part of each matrix.

Shape legend: n own tokens of a stream, m tokens seen, t tokens in the pack, d width, K rows of the
noise-level table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from kinodit.models.tokens import AttentionLayout, ModalityTokens, TokenBatch

Parts = Mapping[str, Tensor]
"""stream -> tensor; single blocks have one entry for the tokens of all streams."""


class Spot(NamedTuple):
    """Where seen tokens of a stream are. position: [m, 3]; level: [m]; as in `ModalityTokens`."""

    position: Tensor
    level: Tensor


class Exchange(Protocol):
    """What a parallel layout does at the seams. Every process of a group calls the same."""

    def seen(self, name: str, batch: TokenBatch) -> Spot:
        """The tokens of a stream that this process sees."""
        ...

    def whole(self, name: str, batch: TokenBatch) -> tuple[ModalityTokens, Tensor]:
        """All tokens of a stream, and [n] int64: which of them are this process's own."""
        ...

    def gather(self, parts: Parts, layout: AttentionLayout) -> dict[str, Tensor]:
        """Own tokens [n, d] of all streams -> the tokens seen [m, d]."""
        ...

    def scatter(self, parts: Parts, layout: AttentionLayout) -> dict[str, Tensor]:
        """Partial results [m, d] for the tokens seen -> their sums for the own tokens [n, d]."""
        ...

    def own(self, name: str, seen: Tensor, layout: AttentionLayout) -> Tensor:
        """[m, ...] of the tokens seen of a stream (or of all) -> [n, ...] of the own ones."""
        ...

    def gather_pack(
        self, name: str, seen: Tensor, layout: AttentionLayout
    ) -> tuple[Tensor, Tensor]:
        """[m, ...] of the tokens seen of a stream (or of all) -> [t, ...] of all in the pack.

        In the order of the pack; and [m] int64, which of them are seen. Without gradients.
        """
        ...

    def join(self, rows: Parts) -> dict[str, Tensor]:
        """This process's columns of modulation rows [K, ...] -> all columns."""
        ...
