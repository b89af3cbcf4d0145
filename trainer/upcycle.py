"""Starting a model with experts from a run of the same model without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.moe.upcycle import Values, upcycled_values
from kinodit.trainer import checkpoint
from kinodit.trainer.checkpoint.restricted import read_index
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import Mesh

PREFIX = "model/"


@dataclass(frozen=True)
class UpcycleConfig:
    """Where a model with experts starts from.

    run:   folder of a run of the same recipe without experts, of which the newest checkpoint is
           taken; "": none, and weights start as they always do
    noise: standard deviations of each matrix by which the copies of an expert are moved apart
           (without effect where the shared expert is the copy); 0: the model says at first exactly
           what the other said
    """

    run: str = ""
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ConfigError(f"upcycle.noise={self.noise}: must not be negative")


def starting_values(config: UpcycleConfig, model: MMDiTConfig, seed: int, mesh: Mesh) -> Values:
    """What each parameter of `model` starts from. Collective.

    Every rank reads the weights of the dense model whole, into host memory.

    Raises:
        ConfigError: there is no checkpoint, or not of that model.
        BrokenCheckpoint: it is damaged.
    """
    initial = initial_values(seed)
    if not config.run:
        return initial
    if not model.experts:
        raise ConfigError(
            f"upcycle.run={config.run}, but the model has no experts: set model.experts, or leave "
            "upcycle.run empty"
        )
    folder = Path(config.run)
    found = mesh.from_main(lambda: checkpoint.find_checkpoints(folder))
    if not found:
        raise ConfigError(f"upcycle.run={config.run}: there is no checkpoint in that folder")
    dense = _Dense(found[-1], mesh)
    return upcycled_values(model, dense, initial, config.noise, seed)


class _Dense:
    """The weights in a checkpoint, by name."""

    def __init__(self, path: Path, mesh: Mesh) -> None:
        self._path = path
        entries = read_index(path).state_dict_metadata
        self._tensors = {
            key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if key.startswith(PREFIX)
        }
        checkpoint.load(path, self._tensors, mesh)

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        found = self._tensors.get(PREFIX + name)
        if found is None or found.shape != tuple(shape):
            held = "nothing of that name" if found is None else f"one of shape {list(found.shape)}"
            raise ConfigError(
                f"{self._path} cannot start this model: for {name} of shape {list(shape)} it has "
                f"{held}. It must be of the same recipe, but for model.experts"
            )
        return found
