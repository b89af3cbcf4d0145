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
    crc32: Callable[[Bytes], int] = zlib.crc32
else:
    crc32 = zlib_ng.crc32
"""The CRC-32 (ISO 3309) of bytes. Other threads run meanwhile."""

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
