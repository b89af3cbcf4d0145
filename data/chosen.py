"""Which samples of a dataset take part, in a bit each: of a hundred million in 13 MB."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024
"""Samples between which it is known how many were chosen: finding one looks at so many bits."""
_AT_ONCE = 4096


class Chosen:
    """Samples of a dataset, in ascending order; the k-th of them is found in constant time."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        """mask: [samples of the dataset], True where one takes part."""
        num_blocks = -(-len(mask) // _BLOCK)
        self._bits = np.zeros((num_blocks, _BLOCK // 8), dtype=np.uint8)
        packed = np.packbits(mask)
        self._bits.reshape(-1)[: len(packed)] = packed
        counts = np.add.reduceat(mask, np.arange(0, len(mask), _BLOCK), dtype=np.int64)
        self._before = np.zeros(num_blocks + 1, dtype=np.int64)
        np.cumsum(counts, out=self._before[1:])

    @classmethod
    def of(cls, samples: NDArray[np.int64]) -> Chosen:
        """Those of these numbers, each once and in any order."""
        mask = np.zeros(int(samples.max(initial=-1)) + 1, dtype=np.bool_)
        mask[samples] = True
        return cls(mask)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] the samples at `places` [n], each from 0 to len - 1."""
        found = np.empty(len(places), dtype=np.int64)
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            block = np.searchsorted(self._before, some, side="right") - 1
            bits = np.unpackbits(self._bits[block], axis=1)
            there = np.cumsum(bits, axis=1, dtype=np.int16)
            within = some - self._before[block]
            found[start : start + _AT_ONCE] = block * _BLOCK + (there > within[:, None]).argmax(1)
        return found

    def __contains__(self, sample: int) -> bool:
        byte, bit = divmod(sample, 8)
        packed = self._bits.reshape(-1)
        return byte < len(packed) and bool(packed[byte] >> (7 - bit) & 1)

    def place_of(self, sample: int) -> int:
        """How many samples before `sample` take part: its place, if it does itself."""
        block, within = divmod(sample, _BLOCK)
        before = np.unpackbits(self._bits[block])[:within]
        return int(self._before[block]) + int(before.sum())

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        """All of them in order, some at a time."""
        per_piece = 1024
        for start in range(0, len(self._bits), per_piece):
            bits = np.unpackbits(self._bits[start : start + per_piece])
            yield np.flatnonzero(bits) + start * _BLOCK

    def numbers(self) -> NDArray[np.int64]:
        """[len] all of them."""
        return np.concatenate([np.empty(0, np.int64), *self.pieces()])
