"""Real processes that talk over gloo, started once and used for many cases of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from kinodit.data import fork_server
from kinodit.trainer.certify import ranks

ROOT = Path(__file__).resolve().parents[2]


def _serve(*args: Any) -> None:
    """As a rank of `kinodit train`: what it will decode in is forked before it meets the others."""
    fork_server.fork_early()
    ranks.Ranks.body(*args)


class Ranks(ranks.Ranks):
    """A group of `world_size` gloo processes that can import the tests."""

    body = staticmethod(_serve)
    # What modules of tests import besides.
    preloaded: ClassVar[list[str]] = [
        *ranks.PRELOADED,
        "pytest",
        "hypothesis",
        "kinodit.trainer.engine.deepspeed",
        "kinodit.trainer.run",
    ]

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size, (str(ROOT), str(ROOT / "src")))


class Groups(dict[int, Ranks]):
    """Number of ranks -> a group of so many, which is started when it is first asked for."""

    def __missing__(self, num_ranks: int) -> Ranks:
        made = self[num_ranks] = Ranks(num_ranks)
        return made

    def close(self) -> None:
        """Stop all processes."""
        for group in self.values():
            group.close()
