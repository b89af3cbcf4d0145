"""A text encoder without weights: one token per byte. For tests and smoke runs.

It knows spelling and order, not meaning.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.encoders.base import TextEncoderConfig, TextFeatures
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal

BEGIN = 256
"""The token before the first byte, so that the empty caption has a token too."""


@dataclass(frozen=True, kw_only=True)
class ByteTextConfig(TextEncoderConfig):
    """dim: features per token; max_tokens: longer captions are cut; seed: of the embedding."""

    name: Literal["bytes"] = "bytes"
    dim: int = 64
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2 or self.max_tokens < 1:
            raise ConfigError(
                f"the byte encoder needs an even dim of at least 2 and max_tokens of at least 1, "
                f"got dim={self.dim}, max_tokens={self.max_tokens}"
            )

    def build(self, device: torch.device) -> ByteTextEncoder:
        """The encoder on `device`."""
        return ByteTextEncoder(self, device)


class ByteTextEncoder:
    """Keyed-random embeddings of UTF-8 bytes plus sinusoids of their place; pooled is the mean."""

    def __init__(self, config: ByteTextConfig, device: torch.device) -> None:
        self.max_tokens = config.max_tokens
        self.token_dim = config.dim
        self.pooled_dim = config.dim
        self.fingerprint = hashlib.sha256(repr(sorted(asdict(config).items())).encode()).hexdigest()
        table = normal(generator(config.seed, "byte embedding"), (257, config.dim))
        self._table = (table / math.sqrt(2)).to(device)
        self._places = _sinusoids(config.max_tokens, config.dim).to(device)

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features of each caption: [1 + number of bytes, dim], cut to `max_tokens`."""
        features = []
        for caption in captions:
            codes = [BEGIN, *caption.encode()][: self.max_tokens]
            index = torch.tensor(codes, device=self._table.device)
            tokens = self._table[index] + self._places[: len(codes)]
            features.append(TextFeatures(tokens=tokens, pooled=tokens.mean(0)))
        return features


def _sinusoids(length: int, dim: int) -> Tensor:
    """[length, dim] of mean square 1/2 (Vaswani et al., 2017, section 3.5)."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(torch.float32)
