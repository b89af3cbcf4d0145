"""`KEY.json` parsed and checked in one pass, by msgspec: every sample that is read goes through it.

What does not pass here may still be right, in a way that is not usual; `kinodit.data.meta` judges,
and names what is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec.structs import asdict

from kinodit.data.meta import (
    MAX_DURATION_S,
    MAX_FPS,
    MAX_FRAMES,
    MAX_REFERENCES,
    MAX_SAMPLE_RATE,
    MAX_SIDE,
    Caption,
    Modality,
    RecordMeta,
)

T = TypeVar("T", Caption, RecordMeta)

_Side = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)]


class _UsualCaption(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`Caption` as JSON has it."""

    text: str
    lang: str = "en"
    source: str = ""
    weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0


class _UsualMeta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`RecordMeta` as JSON has it, with the bounds that `parse_meta` checks."""

    schema: Literal[1]
    modality: Modality
    id: str | msgspec.UnsetType = msgspec.UNSET
    width: _Side = 0
    height: _Side = 0
    fps: Annotated[float, msgspec.Meta(ge=0, le=MAX_FPS)] = 0.0
    num_frames: Annotated[int, msgspec.Meta(ge=0, le=MAX_FRAMES)] = 0
    duration_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_DURATION_S)] = 0.0
    has_audio: bool = False
    sample_rate: Annotated[int, msgspec.Meta(ge=0, le=MAX_SAMPLE_RATE)] = 0
    captions: list[_UsualCaption] = []
    scores: dict[str, float] = {}
    extra: dict[str, str] = {}
    source: str = ""
    licence: str = ""
    sha256: dict[str, str] = {}
    references: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_REFERENCES)] = ()


_USUAL = msgspec.json.Decoder(_UsualMeta)


def usual_meta(key: str, payload: bytes) -> RecordMeta | None:
    """What `parse_meta` makes of the JSON `payload` of sample `key`, if it is as it should be.

    None if it is not, or is in a way that msgspec does not take (UTF-16, say).
    """
    try:
        said = _USUAL.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    values = asdict(said)
    if said.id is msgspec.UNSET:
        values["id"] = key
    values["captions"] = tuple([_made(Caption, asdict(caption)) for caption in said.captions])
    return _made(RecordMeta, values)


def _made(kind: type[T], values: dict[str, Any]) -> T:
    """A frozen dataclass of all its fields, past its constructor.

    That sets one field after the other by a call, and takes as long as parsing the JSON does.
    """
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", values)
    return made
