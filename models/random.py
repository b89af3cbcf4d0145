"""Keyed random draws: the only source of randomness.

A draw is a pure function of its key. Bits come from Philox-4x64 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), whose 128-bit key is a BLAKE2b hash of the named parts.
torch's CPU generator is not used: it keeps 32 bits of its seed, so that among a few hundred
thousand keyed draws two would be equal. Drawn on the host in float32, then moved and cast: the
same bits on every device and in every precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kinodit.models.tokens import SampleKey

KeyPart = int | str


def generator(*parts: KeyPart) -> np.random.Generator:
    """A generator whose stream is a pure function of `parts`.

    Parts are separated and typed before hashing: ("a", "bc") and ("ab", "c"), 1 and "1" differ.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def sample_generator(seed: int, key: SampleKey, purpose: str) -> np.random.Generator:
    """The generator of one purpose ("noise/video", "timestep", ...) for one sample of one step."""
    return generator(seed, key.step, key.slot, key.sample, purpose)


def normal(source: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers of `shape`, float32, on the CPU."""
    return torch.from_numpy(source.standard_normal(tuple(shape), dtype=np.float32))


def uniform(source: np.random.Generator) -> float:
    """One number uniform in [0, 1), float64."""
    return float(source.random())
