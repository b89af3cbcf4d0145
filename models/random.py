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


def sample_keys(seed: int, keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """[S] int64 on the CPU: a number for each sample, for draws that are made on the device."""
    drawn = [int(sample_generator(seed, key, purpose).integers(2**63)) for key in keys]
    return torch.tensor(drawn, dtype=torch.int64)


def hashed_uniform(keys: Tensor, key: int, num: int) -> Tensor:
    """[S] int64 -> [S, num] float64 in (0, 1), a pure function of each of `keys`, `key` and place.

    SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014, figure
    17), whose integers are the same on every device.
    """
    place = torch.arange(1, num + 1, device=keys.device) + key
    mixed = keys.unsqueeze(-1) + place * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # A shift of signed integers brings in copies of the sign: they are cut off.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (((mixed >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
"""SplitMix64's constants, as signed integers."""
