"""What each rank of a ring has to do, from the tokens that it was dealt.

Ranks that exchange heads have the same pairs with fewer heads each, so what is balanced between the
hops of a ring is balanced between all ranks.

Shape legend: G groups of the layout, R hops of the ring (each the ranks of one ulysses group).
"""

from __future__ import annotations

from collections.abc import Iterator

from kinodit.models.tokens import AttentionLayout
from kinodit.trainer.parallel.pairs import Pieces, Rows, keys_sent


def part_sent(pieces: Pieces, visible: Rows) -> float:
    """Of the keys that hops have of each other, the part that is sent: 1 if all are seen."""
    num_hops, total = len(pieces), sum(map(sum, pieces))
    sent = sum(
        sum(keys_sent(pieces, visible, here, there))
        for here in range(num_hops)
        for there in range(num_hops)
        if here != there
    )
    return sent / (total * (num_hops - 1)) if total and num_hops > 1 else 1.0


def pairs_met(pieces: Pieces, visible: Rows) -> list[list[int]]:
    """[R][R]: pairs (query of hop `here`, key of hop `there`) that attention computes."""
    return [list(_pairs_of(pieces, visible, here)) for here in range(len(pieces))]


def _pairs_of(pieces: Pieces, visible: Rows, here: int) -> Iterator[int]:
    for keys in pieces:
        yield sum(
            count * sum(keys[key] for key in row)
            for count, row in zip(pieces[here], visible, strict=True)
            if count
        )


def imbalance(layout: AttentionLayout, pieces: Pieces) -> float:
    """Pairs of the hop that has the most of them, over their mean: 1 if all have as many."""
    totals = [sum(row) for row in pairs_met(pieces, layout.visible)]
    return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0
