"""Samples of archives that are read from their beginning: compressed, or of servers without ranges.

Headers are as strict as where there is an index, and what is inflated is bounded: an archive of
some kilobytes must not fill the memory. A damaged header ends an archive, since what was read
cannot be looked at again; that is told, never silent.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from kinodit.data.config import StorageConfig
from kinodit.data.foreign import FailedSampleError
from kinodit.data.index import read_sample
from kinodit.data.reader import SampleError, readable_key
from kinodit.data.record import MAX_MEMBERS, Record, RecordError
from kinodit.data.remote import retried
from kinodit.data.storage import PIECE_BYTES, Storage, StorageError, TransientError
from kinodit.data.tar import TarError, members, next_member

COMPRESSED, PLAIN = (".tar.gz", ".tgz"), ".tar"
MAX_INFLATION, SLACK_BYTES = 64, 64 << 20
"""An archive may inflate to so many times what was read of it, and some more: media do not."""


def archive_samples(
    name: str, where: str, storage: Storage | None, config: StorageConfig
) -> Iterator[Record | SampleError]:
    """The records of one archive in their order; in place of those that cannot be read, why.

    Args:
        name: of the archive in `storage`.
        where: its path or URL: what is opened if there is no `storage`, and for messages.
        storage: where it lies; None on a file system.
        config: how often and how long it is tried.
    """
    pieces = _local_pieces(Path(where)) if storage is None else _begun(name, storage, config)
    source = _Source(_inflated(pieces) if name.endswith(COMPRESSED) else pieces)
    num_runs = 0
    try:
        for run in _runs(source):
            num_runs += 1
            try:
                yield read_sample(run)
            except FailedSampleError:
                continue
            except (TarError, RecordError) as error:
                yield SampleError(f"{where}: {error}", readable_key(run))
        if not num_runs:
            yield SampleError(f"{where} has no samples: it is empty, or was overwritten")
    except (TarError, StorageError, TransientError, zlib.error) as error:
        yield SampleError(
            f"{where}: {error}. It is streamed, so that all of it behind byte {source.offset} is "
            "lost this time; with an index it would be one sample"
        )


class _Source:
    """Bytes in the sizes that are asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = bytearray()
        self.offset = 0

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end."""
        while len(self._held) < size:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._held += piece
        found = bytes(self._held[:size])
        del self._held[:size]
        self.offset += len(found)
        return found


def _runs(source: _Source) -> Iterator[bytes]:
    """The members of one key after the other, as they lie in the archive.

    What was read before an error is given if it has the members that another sample has.
    """
    held: dict[str, bytes] = {}
    usual: set[frozenset[str]] = set()
    key = ""
    try:
        while data := next_member(source.read, source.offset):
            (member,) = members(data, whole=False)
            name, _, extension = member.name.partition(".")
            if held and name != key:
                yield b"".join(held.values())
                usual.add(frozenset(held))
                held.clear()
            key = name
            if extension in held or len(held) > MAX_MEMBERS:
                raise TarError(
                    f"sample {key[:160]!r} has a member twice, or more than {MAX_MEMBERS} of them"
                )
            held[extension] = data
        while rest := source.read(PIECE_BYTES):
            if rest.count(0) != len(rest):
                raise TarError("there are bytes after its end-of-archive marker")
    except (TarError, StorageError, TransientError, zlib.error):
        if frozenset(held) in usual:
            yield b"".join(held.values())
        raise
    if held:
        yield b"".join(held.values())


def _local_pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise StorageError(f"it cannot be read: {error.strerror or error}") from error


def _begun(name: str, storage: Storage, config: StorageConfig) -> Iterator[bytes]:
    """The archive's bytes. What fails before the first of them is tried again."""
    pieces: list[Iterator[bytes]] = []

    def begin() -> bytes:
        pieces[:] = [storage.pieces(name, config.attempt_limit_s)]
        return next(pieces[0], b"")

    yield retried(name, begin, config)
    yield from pieces[0]


def _inflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What gzip made of an archive, of several parts too, never more than a piece at once."""
    inflater, taken, given = zlib.decompressobj(31), 0, 0
    for piece in pieces:
        taken += len(piece)
        left = piece
        while left:
            out = inflater.decompress(left, PIECE_BYTES)
            left = inflater.unconsumed_tail
            if inflater.eof:
                left = inflater.unused_data.lstrip(b"\0")
                inflater = zlib.decompressobj(31)
            given += len(out)
            if given > MAX_INFLATION * taken + SLACK_BYTES:
                raise TarError(
                    f"{taken} bytes of it inflate to more than {given}: that is no archive of media"
                )
            if out:
                yield out
