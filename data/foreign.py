"""Samples of shards that other tools wrote: what their JSON says, as a record of ours.

img2dataset, video2dataset and their kin write `KEY.json` without a schema: a caption, where the
medium came from, whether it could be had, and numbers that people filter on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kinodit.data.meta import MAX_SIDE, Caption, Modality, RecordError, RecordMeta

CAPTION_KEYS = ("caption", "text", "TEXT", "prompt")
SOURCE_KEYS = ("url", "URL", "videoLoc", "source")
LICENCE_KEYS = ("license", "licence", "LICENSE")
SUCCESS = "success"
MAX_FIELDS, MAX_CHARS = 64, 1024
_NAMED = frozenset(
    (*CAPTION_KEYS, *SOURCE_KEYS, *LICENCE_KEYS, "captions", "key", "lang", "status", "exif",
     "error_message", "width", "height", "sha256", "md5")
)  # fmt: skip


class FailedSampleError(RecordError):
    """A sample of another tool that holds no more than the news that it could not be had."""


def foreign_meta(
    key: str, modality: Modality, text: str | None, document: Mapping[str, Any]
) -> RecordMeta:
    """The metadata of a sample whose JSON is of another tool; `{}` if it has none.

    The caption is `text` (that of its `txt`), or what the JSON calls caption, text or prompt, or
    the first of its captions; numbers are kept as scores, short texts as extra, so that filters see
    them. img2dataset says the size of the picture that it wrote; all other sizes are left unknown.

    """
    width, height = _picture_size(document) if modality == "image" else (0, 0)
    scores, extra = _kept(document)
    return RecordMeta(
        id=key,
        modality=modality,
        width=width,
        height=height,
        num_frames=1 if width else 0,
        captions=_captions(text, document),
        scores=scores,
        extra=extra,
        source=_first_text(document, SOURCE_KEYS),
        licence=_first_text(document, LICENCE_KEYS),
    )


def require_success(key: str, document: Mapping[str, Any]) -> None:
    """Raises FailedSampleError for a sample that its own tool could not get."""
    status = document.get("status", SUCCESS)
    if status != SUCCESS:
        message = document.get("error_message")
        raise FailedSampleError(
            f"sample {key!r}: the tool that wrote it could not get it: {str(status)[:80]}"
            + (f" ({message[:160]})" if isinstance(message, str) and message else "")
        )


def picture_facts(text: str | None, document: object) -> tuple[int, int, int] | None:
    """(width, height, characters of the first caption) as `foreign_meta` has them of a picture.

    Args:
        text: that of its `txt`.
        document: what its JSON says; without `schema`.

    None if that is no object, has a schema, does not say the size, or that it could not be got.
    """
    if not isinstance(document, dict) or "schema" in document:
        return None
    width, height = _picture_size(document)
    if not width or document.get("status", SUCCESS) != SUCCESS:
        return None
    if text is not None:
        return width, height, len(text.strip())
    captions = _captions(None, document)
    return width, height, len(captions[0].text) if captions else 0


def _picture_size(document: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) as img2dataset says it: of the picture in the shard, after any resizing."""
    width, height = document.get("width"), document.get("height")
    # What JSON calls true is an instance of int, and not of that class.
    if not ("original_width" in document and type(width) is type(height) is int):
        return 0, 0
    return (width, height) if 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE else (0, 0)


def _captions(text: str | None, document: Mapping[str, Any]) -> tuple[Caption, ...]:
    lang = document.get("lang", "en")
    lang = lang if isinstance(lang, str) else "en"
    if text is not None:
        found = [text]
    else:
        several = document.get("captions")
        listed = several if isinstance(several, list) else []
        texts = [item.get("text") if isinstance(item, dict) else item for item in listed]
        found = [
            _first_text(document, CAPTION_KEYS),
            *(item for item in texts if isinstance(item, str)),
        ]
    unique = dict.fromkeys(caption.strip() for caption in found)
    return tuple(Caption(caption, lang) for caption in unique if caption)


def _kept(document: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Scores and extra: fields that are not in the module's tables, the first `MAX_FIELDS`."""
    scores: dict[str, float] = {}
    extra: dict[str, str] = {}
    for name, value in document.items():
        if name in _NAMED or len(scores) + len(extra) == MAX_FIELDS:
            continue
        if isinstance(value, str) and 0 < len(value) <= MAX_CHARS:
            extra[name] = value
        elif isinstance(value, int | float) and math.isfinite(number := _float(value)):
            scores[name] = number
    return scores, extra


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _first_text(document: Mapping[str, Any], names: tuple[str, ...]) -> str:
    found = (document.get(name) for name in names)
    return next((value for value in found if isinstance(value, str) and value.strip()), "")
