"""What a row of an index says of a sample beside where it lies: of its record, or without one.

Making a record of what img2dataset wrote takes longer than all else that is done to index a
picture, and of its fields a row has three.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import msgspec

from kinodit.data.foreign import picture_facts
from kinodit.data.meta import MODALITIES, Modality, RecordMeta
from kinodit.data.record import (
    KEY_PATTERN,
    MAX_JSON_DEPTH,
    MAX_TEXT_BYTES,
    MEDIA_MEMBERS,
    UNUSED_MEMBERS,
)
from kinodit.data.usual_meta import usual_meta

FLAG_AUDIO = 1
MAX_CAPTION_CHARS = (1 << 16) - 1

RowFacts = tuple[int, int, int, int, int, int, int, int]
"""Frames, height and width in pixels, thousandths of frames per second, milliseconds, characters of
the first caption, modality (an index into `MODALITIES`), flags: the columns of a row, in order."""

_JSON = msgspec.json.Decoder()
_NO_MEDIA = frozenset({"json", "txt", *UNUSED_MEMBERS})
_SCALARS = frozenset({str, int, float, bool, type(None)})
_IMAGE = MODALITIES.index("image")


def facts_of(meta: RecordMeta) -> RowFacts:
    """What a row says of a sample of these metadata."""
    caption_chars = len(meta.captions[0].text) if meta.captions else 0
    return (
        meta.num_frames,
        meta.height,
        meta.width,
        round(meta.fps * 1000),
        round(meta.duration_s * 1000),
        min(caption_chars, MAX_CAPTION_CHARS),
        MODALITIES.index(meta.modality),
        FLAG_AUDIO if meta.has_audio else 0,
    )


def usual_facts(key: str, members: Mapping[str, slice], view: memoryview) -> RowFacts | None:
    """`facts_of` the metadata that `read_meta` finds in a sample with these parts of `view`.

    None if anything about it is unusual, wrong, or to be asked of the medium: `read_meta` judges.
    """
    said, text = members.get("json"), members.get("txt")
    modality = _modality_of(tuple(members))
    if said is None or modality is None or not KEY_PATTERN.fullmatch(key):
        return None
    payload = view[said].tobytes()
    caption = b"" if text is None else view[text]
    if len(payload) > MAX_TEXT_BYTES or len(caption) > MAX_TEXT_BYTES:
        return None
    if b'"schema"' in payload:
        meta = usual_meta(payload)
        if meta is None or meta.modality != modality or meta.references or not meta.is_probed:
            return None
        return facts_of(meta)
    if modality != "image":
        return None
    try:
        document = _JSON.decode(payload)
        found = picture_facts(None if text is None else str(caption, "utf-8"), document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if found is None:
        return None
    if not _SCALARS.issuperset(map(type, document.values())) and _may_be_deep(payload):
        return None
    width, height, caption_chars = found
    return 1, height, width, 0, 0, min(caption_chars, MAX_CAPTION_CHARS), _IMAGE, 0


def _may_be_deep(payload: bytes) -> bool:
    """Whether there are so many objects and lists that they may be nested too deep."""
    return payload.count(b"{") + payload.count(b"[") > MAX_JSON_DEPTH


@lru_cache(1 << 8)
def _modality_of(names: tuple[str, ...]) -> Modality | None:
    """That of a sample with these members, if they are one medium and what goes with any."""
    media = [name for name in names if name not in _NO_MEDIA]
    if len(media) != 1:
        return None
    return next((of for of in MODALITIES if media[0] in MEDIA_MEMBERS[of]), None)
