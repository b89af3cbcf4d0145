"""What a long suite looks at in its small size: another part of it with every commit."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

from tests.support.ranks import ROOT

T = TypeVar("T")


def sampled(every: Sequence[T], count: int, size: str, purpose: str) -> list[T]:
    """`count` of them, drawn by the commit and `purpose`; all of them where size is "full"."""
    if size == "full":
        return list(every)
    chosen = _drawn(purpose).sample(range(len(every)), min(count, len(every)))
    return [every[index] for index in sorted(chosen)]


def shuffled(every: Sequence[T], purpose: str) -> list[T]:
    """All of them, in an order drawn by the commit and `purpose`."""
    return _drawn(purpose).sample(list(every), len(every))


def commit_seed(purpose: str) -> int:
    """A number that changes with the commit: what fails at one fails there again."""
    return _drawn(purpose).getrandbits(32)


def _drawn(purpose: str) -> random.Random:
    return random.Random(f"{_commit()} {purpose}")


@cache
def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
