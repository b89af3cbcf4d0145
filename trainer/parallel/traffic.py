"""Counting what crosses between ranks in a step, by what it is for.

Whoever talks says so with `note`, FSDP2 included (`trainer/parallel/shard.py`). A message is a
collective that a rank takes part in, or a transfer that it receives. Bytes are those that it has to
receive, whatever the algorithm: of an all-gather what the others have, (n - 1) / n of the whole;
of a reduce-scatter as much; of an all-reduce both; of an all-to-all and of a transfer what comes
from others. The least that a layout needs is in `trainer/parallel/volume.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

CONTROL = "control"
"""What messages about a step are for: counts of tokens, the norm of the gradient, flags."""

_WATCHING: list[Traffic] = []

Listener = Callable[[str, str, int], None]
"""Is told of each message before it begins: label, kind, bytes."""
_LISTENERS: list[Listener] = []


@dataclass(eq=False)
class Traffic:
    """Messages and bytes by (label, kind) while it is entered, on this rank."""

    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __enter__(self) -> Traffic:
        _WATCHING.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _WATCHING.remove(self)

    @property
    def labels(self) -> set[str]:
        """What there were messages for."""
        return {label for label, _ in self.messages}

    def total(self, label: str) -> tuple[int, int]:
        """(messages, bytes) of a label, of any kind."""
        keys = [key for key in self.messages if key[0] == label]
        return sum(self.messages[key] for key in keys), sum(self.num_bytes[key] for key in keys)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the context `listener` hears of every message of this rank."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def note(label: str, kind: str, num_bytes: int) -> None:
    """Report one message to whoever counts or listens."""
    for listener in _LISTENERS:
        listener(label, kind, num_bytes)
    for traffic in _WATCHING:
        traffic.messages[label, kind] += 1
        traffic.num_bytes[label, kind] += num_bytes


def others_share(whole: Tensor, num_ranks: int) -> int:
    """Bytes of `whole` that equal parts on the other ranks of a group make up."""
    return whole.nbytes * (num_ranks - 1) // num_ranks
