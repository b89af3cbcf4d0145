"""What each rank of a ring has to be sent, from the tokens that it was dealt.

Shape legend: G groups of the layout, R hops of the ring (each the ranks of one ulysses group).
"""

from __future__ import annotations

from functools import lru_cache

Pieces = tuple[tuple[int, ...], ...]
"""[R][G]: how many tokens of each group a hop was dealt."""
Rows = tuple[tuple[int, ...], ...]
"""[G]: the groups that queries of each group see."""


@lru_cache(maxsize=256)
def keys_sent(pieces: Pieces, visible: Rows, here: int, there: int) -> tuple[int, ...]:
    """[G]: tokens of each group whose keys hop `there` sends to hop `here`.

    All of its tokens of a group that some query of `here` sees, and none of the others. A hop has
    its own keys, seen or not.
    """
    if here == there:
        return pieces[there]
    seen = {key for count, row in zip(pieces[here], visible, strict=True) if count for key in row}
    return tuple(count if group in seen else 0 for group, count in enumerate(pieces[there]))
