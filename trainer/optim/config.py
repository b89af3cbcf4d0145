"""What a recipe says of its optimizer: a named choice, and rules for groups of parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from kinodit.models.errors import ConfigError

QUANTISED_BLOCK = 256
"""Numbers that share a scale in 8-bit moments."""
QUANTISED_FROM = 4096
"""Numbers of the smallest parameter whose moments take 8 bits (Dettmers et al., section 2.3)."""


@dataclass(frozen=True)
class ParameterRule:
    """Parameters whose name contains a match of `pattern` (a regular expression).

    lr_scale multiplies the schedule's rate; weight_decay replaces the optimizer's; the first rule
    that matches a name decides.
    """

    pattern: str = ""
    lr_scale: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), and what every choice has.

    Vectors (norms, biases) have no weight decay unless a rule says otherwise.
    max_grad_norm: gradients are scaled so that their global norm is at most this; 0 = never
    """

    name: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    rules: dict[str, ParameterRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self) is not OPTIMIZERS[self.name]:
            raise ConfigError(f"optim.name={self.name}: {type(self).__name__} is another choice")
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr}: must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)}: each must be in [0, 1)")
        if self.max_grad_norm < 0:
            raise ConfigError(f"optim.max_grad_norm={self.max_grad_norm}: must not be negative")


def is_vector(name: str, num_dims: int) -> bool:
    """Whether the parameter `name` is a vector; stacked biases of experts are one for each."""
    return num_dims == 1 or name.endswith("_bias")


@dataclass(frozen=True)
class MuonConfig(OptimConfig):
    """Muon for hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), else AdamW.

    Its steps have the size of AdamW's, so that lr and weight_decay are those of both (Liu et al.,
    arXiv 2502.16982, section 2.2).

    adamw:          matrices whose name contains a match are AdamW's, as are all vectors: those
                    that embed, those that predict, and those that make vectors (modulation)
    momentum:       of Nesterov's kind
    num_iterations: of Newton and Schulz's
    """

    name: Literal["muon"] = "muon"
    adamw: str = r"^embeds\.[^.]+\.linear|^condition\.|^heads\.|modulation|refiner\.(time|pooled)"
    momentum: float = 0.95
    num_iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum={self.momentum}: must be in [0, 1)")
        if self.num_iterations < 1:
            raise ConfigError(f"optim.num_iterations={self.num_iterations}: must be at least 1")

    def takes(self, name: str, num_dims: int) -> bool:
        """Whether Muon updates the parameter `name`."""
        is_matrix = num_dims == 2 and not is_vector(name, num_dims)
        return is_matrix and re.search(self.adamw, name) is None


@dataclass(frozen=True)
class AdamW8bitConfig(OptimConfig):
    """AdamW with moments of 8 bits (Dettmers et al., arXiv 2110.02861), by torchao.

    Matrices of at least 4096 numbers in rows of a multiple of 256 have them; the moments of others
    stay as they are.
    """

    name: Literal["adamw8bit"] = "adamw8bit"

    def quantises(self, shape: tuple[int, ...]) -> bool:
        """Whether the moments of a parameter of the whole `shape` take 8 bits.

        Blocks lie within rows, so that the whole shape decides and every layout has the same ones.
        """
        if len(shape) != 2 or shape[0] * shape[1] < QUANTISED_FROM:
            return False
        return shape[1] % QUANTISED_BLOCK == 0


OPTIMIZERS: dict[str, type[OptimConfig]] = {
    "adamw": OptimConfig,
    "muon": MuonConfig,
    "adamw8bit": AdamW8bitConfig,
}
"""The choices of optim.name."""
