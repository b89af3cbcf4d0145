"""Names of shards in short: {000..031} and {a,b} written out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from kinodit.models.errors import UserError

MAX_NAMES = 1_000_000
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{},]*(?:,[^{},]*)+))\}")


class BraceError(UserError):
    """A short name that stands for too many."""


def expanded(names: Iterable[str]) -> Iterator[str]:
    """The names, in the order in which they are written out.

    Raises BraceError if there are more than `MAX_NAMES`; no more than that are held.
    """
    count = 0
    waiting = list(names)[::-1]
    while waiting:
        name = waiting.pop()
        found = _BRACES.search(name)
        if found is None:
            count += 1
            yield name
            continue
        first, last, several = found.groups()
        values: Iterable[str] = (several or "").split(",")
        if first is not None:
            low, high = int(first), int(last)
            width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
            if abs(high - low) > MAX_NAMES:
                count = MAX_NAMES + 1
            else:
                step = 1 if low <= high else -1
                values = (f"{n:0{width}d}" for n in range(low, high + step, step))
        if count + len(waiting) > MAX_NAMES:
            raise BraceError(f"{name[:160]!r} stands for more than {MAX_NAMES} names")
        written = [name[: found.start()] + value + name[found.end() :] for value in values]
        waiting += written[::-1]
