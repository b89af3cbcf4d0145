"""Checksums: CRC-32 of samples, and the digest that names the contents of a shard.

CRC-32 is worked out at every read, so that zlib-ng's is used: zlib's numbers, by carry-less
multiplication (Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ
instruction", Intel, 2009), in a quarter of the time or less. It has builds for x86-64 and ARM;
where it has none, zlib's own is used.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Literal

Bytes = bytes | bytearray | memoryview

try:
    from zlib_ng import zlib_ng
except ImportError:
    crc32: Callable[..., int] = zlib.crc32
else:
    crc32 = zlib_ng.crc32
"""The CRC-32 (ISO 3309) of bytes, behind others with the one that is given. Other threads run
meanwhile."""

PIECE_BYTES = 1 << 18
"""Pieces in which a shard is hashed: many enough for vector units, few enough to stay near."""

Algorithm = Literal["sha256", "blake3"]
ALGORITHMS: dict[Algorithm, str] = {"sha256": "SHA-256", "blake3": "BLAKE3"}
"""Digests of shards, and how they are written in messages."""


class Digest:
    """The digest of bytes that come piece by piece; `num_bytes` so far.

    BLAKE3 (O'Connor et al., "BLAKE3: one function, fast everywhere", 2020) is as hard to forge as
    SHA-256, and some three times as fast on one core with AVX-512.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.num_bytes = 0
        if algorithm == "sha256":
            self._state: Any = hashlib.sha256()
        else:
            from blake3 import blake3

            self._state = blake3()

    def update(self, data: Bytes) -> None:
        """Takes the next bytes. Other threads run meanwhile."""
        self._state.update(data)
        self.num_bytes += len(data)

    def hexdigest(self) -> str:
        """Of all bytes so far, 64 hex digits."""
        text: str = self._state.hexdigest()
        return text


class SpanSums:
    """The CRC-32 of one span of a buffer after the other, and on the way the digest of it all.

    Memory is gone through once, by BLAKE3, a piece ahead: zlib-ng's CRC-32 waits longer for what is
    in none of the processor's caches. Pieces begin at multiples of their size, so that all but the
    last are whole trees of BLAKE3.
    """

    def __init__(self, view: memoryview, digest: Digest | None) -> None:
        self._view = view
        self._digest = digest
        self._summed = 0
        self._hashed = 0 if digest is not None else len(view)

    def crc32_to(self, end: int) -> int:
        """Of the bytes before `end` that no call before has summed."""
        crc = 0
        while end > self._hashed:
            crc = crc32(self._view[self._summed : self._hashed], crc)
            self._summed = self._hashed
            self._hash()
        crc = crc32(self._view[self._summed : end], crc)
        self._summed = end
        return crc

    def finish(self) -> None:
        """Gives the digest what is left of the buffer."""
        while self._hashed < len(self._view):
            self._hash()

    def _hash(self) -> None:
        assert self._digest is not None
        piece = self._view[self._hashed : self._hashed + PIECE_BYTES]
        self._digest.update(piece)
        self._hashed += len(piece)
