"""Activation checkpointing: which blocks recompute their forward in backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class RematConfig:
    """mode: "none", "full" (each block) or "every_nth" (blocks 0, n, 2n, ...)."""

    mode: Literal["none", "full", "every_nth"] = "none"
    n: int = 2

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"remat.n={self.n}: must be at least 1")

    def selected(self, num_blocks: int) -> range:
        """Indices of the blocks that recompute, of `num_blocks`."""
        every = {"none": num_blocks, "full": 1, "every_nth": self.n}[self.mode]
        return range(0, 0 if self.mode == "none" else num_blocks, every)


def apply_remat(config: RematConfig, blocks: list[nn.Module]) -> None:
    """Make the selected `blocks` recompute, in place; module and parameter names stay.

    The block's forward is replaced, not the block: hooks that gather parameters stay outside of
    what is recomputed. Randomness is keyed by sample and drawn outside the model, so no generator
    state needs to be stashed.
    """
    for index in config.selected(len(blocks)):
        block = blocks[index]
        recomputed = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
        setattr(block, "forward", recomputed)  # noqa: B010 - mypy refuses to assign a method
