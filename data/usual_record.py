"""A sample's bytes parsed in one pass, as nearly all are written: all that are read go through it.

What does not pass here may still be right, in a way that is not usual; `kinodit.data.index` judges,
and names what is wrong.
"""

from __future__ import annotations

import re
from functools import lru_cache

from kinodit.data.record import MAX_MEMBER_BYTES, MAX_TEXT_BYTES, MEDIA_MEMBERS, Record
from kinodit.data.tar import BLOCK
from kinodit.data.usual_meta import usual_meta

_HEADER = re.compile(
    rb"(?=[^\0]{3,99}\0)(?=([a-z0-9_-]+)\.([a-z0-9_.]+)\0).{124}([0-7]{11})[\0 ].{20}"
    rb"0.{100}ustar\x0000.{80}\0.{166}",
    re.DOTALL,
)
"""The header of a regular file `KEY.EXTENSION` without a prefix: key, extension and size.

The name ends within its 100 bytes, so that the key is no longer than one may be."""

_TEXTS = frozenset({b"json", b"txt"})
_MEDIA = frozenset[str]().union(*MEDIA_MEMBERS.values())


def usual_record(buffer: bytes) -> Record | None:
    """What the one sample that `buffer` is holds: a medium, our JSON, and perhaps a text.

    The medium stays where it lies in `buffer`. Whoever has read these bytes has compared a checksum
    of them, that of the index or those of the headers: the headers' are not looked at here.

    None of all else.
    """
    places: dict[bytes, tuple[int, int]] = {}
    key, offset, end = b"", 0, len(buffer)
    while offset < end:
        start = offset + BLOCK
        header = _HEADER.fullmatch(buffer, offset, start)
        if header is None:
            return None
        stem, name, digits = header.groups()
        size = int(digits, 8)
        if size > MAX_TEXT_BYTES and (size > MAX_MEMBER_BYTES or name in _TEXTS):
            return None
        stop = start + size
        offset = (stop + BLOCK - 1) & -BLOCK
        if (places and stem != key) or name in places or offset > end:
            return None
        key = stem
        places[name] = start, stop
    medium = _medium_among(tuple(places))
    if medium is None:
        return None
    start, stop = places[b"json"]
    meta = usual_meta(buffer[start:stop])
    if meta is None or meta.references or medium not in MEDIA_MEMBERS[meta.modality]:
        return None
    start, stop = places[medium.encode()]
    return Record(key.decode(), meta, {medium: memoryview(buffer)[start:stop]})


@lru_cache(1 << 10)
def _medium_among(names: tuple[bytes, ...]) -> str | None:
    """The medium of a sample that has, beside it, its JSON and at most a text."""
    rest = [name.decode() for name in names if name not in _TEXTS]
    is_usual = b"json" in names and len(rest) == 1 and rest[0] in _MEDIA
    return rest[0] if is_usual else None
