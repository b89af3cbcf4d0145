"""What is said of one sample: the content of `KEY.json`, checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, cast

from msgspec import Meta, Struct, field, structs

from kinodit.models.errors import UserError

Modality = Literal["video", "image", "audio"]
MODALITIES: tuple[Modality, ...] = ("video", "image", "audio")

SCHEMA = 1
MAX_SIDE = 16_384
MAX_FRAMES = 10_000_000
MAX_DURATION_S = 4_000_000.0
MAX_FPS = 1000.0
MAX_SAMPLE_RATE = 1_000_000
MAX_REFERENCES = 8
"""Reference pictures that a sample may bring along."""


class RecordError(UserError):
    """A sample that breaks the record contract; the message names its key and the field."""


class Caption(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One description of a sample. `weight` is its share when one of several is drawn."""

    text: str
    lang: str = "en"
    source: str = ""
    weight: Annotated[float, Meta(ge=0)] = 1.0


_Side = Annotated[int, Meta(ge=0, le=MAX_SIDE)]


class RecordMeta(
    Struct, frozen=True, forbid_unknown_fields=True, gc=False, tag_field="schema", tag=SCHEMA
):
    """`KEY.json`, version 1. A zero in `width` ... `sample_rate` means "none or not known".

    fps is frames per second, duration_s seconds, sample_rate Hz (of the sound). `scores` are
    numbers to filter on (motion, aesthetic, onset_s, ...), `extra` are strings that describe the
    sample's origin, `sha256` maps a member name to the hex digest of its bytes. `references` are
    the captions of the reference pictures in their order, "" for one without.

    Bounds hold for what is read, not for what is made here.
    """

    id: str
    modality: Modality
    width: _Side = 0
    height: _Side = 0
    fps: Annotated[float, Meta(ge=0, le=MAX_FPS)] = 0.0
    num_frames: Annotated[int, Meta(ge=0, le=MAX_FRAMES)] = 0
    duration_s: Annotated[float, Meta(ge=0, le=MAX_DURATION_S)] = 0.0
    has_audio: bool = False
    sample_rate: Annotated[int, Meta(ge=0, le=MAX_SAMPLE_RATE)] = 0
    captions: tuple[Caption, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    sha256: dict[str, str] = field(default_factory=dict)
    references: Annotated[tuple[str, ...], Meta(max_length=MAX_REFERENCES)] = ()

    @property
    def is_probed(self) -> bool:
        """Whether size and length are known; a shard made by another tool need not say them."""
        if self.modality == "audio":
            return self.duration_s > 0
        known_size = self.width > 0 and self.height > 0
        return known_size and (self.modality == "image" or self.num_frames > 0)


KNOWN_FIELDS = frozenset({"schema", *RecordMeta.__struct_fields__})
CAPTION_FIELDS = frozenset(Caption.__struct_fields__)


def document_of(meta: RecordMeta) -> dict[str, Any]:
    """The JSON object that `parse_meta` makes `meta` of."""
    captions = [structs.asdict(caption) for caption in meta.captions]
    return {"schema": SCHEMA, **structs.asdict(meta), "captions": captions}


def parse_meta(key: str, document: Mapping[str, Any]) -> RecordMeta:
    """`RecordMeta` of a decoded JSON object with a `schema`. Raises RecordError."""
    if document["schema"] != SCHEMA:
        raise RecordError(
            f"sample {key!r}: its JSON is of schema {document['schema']!r}; "
            f"this version of kinodit reads schema {SCHEMA}"
        )
    if not document.keys() <= KNOWN_FIELDS:
        unknown = sorted(document.keys() - KNOWN_FIELDS)
        raise RecordError(
            f"sample {key!r}: JSON field {unknown[0]!r} is unknown; put numbers under 'scores' "
            "and strings under 'extra'"
        )
    modality = document.get("modality")
    if modality not in MODALITIES:
        raise RecordError(
            f"sample {key!r}: 'modality' is {modality!r}; it must be one of {MODALITIES}"
        )
    read = _Fields(key, document)
    return RecordMeta(
        id=read.text("id", key),
        modality=modality,
        width=read.integer("width", MAX_SIDE),
        height=read.integer("height", MAX_SIDE),
        fps=read.number("fps", MAX_FPS),
        num_frames=read.integer("num_frames", MAX_FRAMES),
        duration_s=read.number("duration_s", MAX_DURATION_S),
        has_audio=read.flag("has_audio"),
        sample_rate=read.integer("sample_rate", MAX_SAMPLE_RATE),
        captions=read.captions(),
        scores=read.scores(),
        extra=read.strings("extra"),
        source=read.text("source", ""),
        licence=read.text("licence", ""),
        sha256=read.strings("sha256"),
        references=read.references(),
    )


class _Fields:
    """Reads typed fields of one JSON object; a wrong one raises RecordError with its name."""

    def __init__(self, key: str, document: Mapping[str, Any]) -> None:
        self._key = key
        self._document = document

    def _refuse(self, name: str, value: object, expected: str) -> NoReturn:
        raise RecordError(
            f"sample {self._key!r}: JSON field {name!r} is {str(value)[:80]!r}; expected {expected}"
        )

    def text(self, name: str, default: str) -> str:
        value = self._document.get(name, default)
        if not isinstance(value, str):
            self._refuse(name, value, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self._document.get(name, False)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return value

    def integer(self, name: str, limit: int) -> int:
        value = self._document.get(name, 0)
        if type(value) is not int or not 0 <= value <= limit:
            self._refuse(name, value, f"an integer from 0 to {limit}")
        return value

    def number(self, name: str, limit: float) -> float:
        said = self._document.get(name, 0.0)
        if type(said) is float and 0 <= said <= limit:
            return said
        value = self._finite(name, said)
        if not 0 <= value <= limit:
            self._refuse(name, value, f"a number from 0 to {limit:g}")
        return value

    def scores(self) -> dict[str, float]:
        items = self._mapping("scores").items()
        return {name: self._finite(f"scores.{name}", value) for name, value in items}

    def strings(self, field_name: str) -> dict[str, str]:
        items = self._mapping(field_name)
        for name, value in items.items():
            if not isinstance(value, str):
                self._refuse(f"{field_name}.{name}", value, "a string")
        return dict(items)

    def references(self) -> tuple[str, ...]:
        value = self._document.get("references", [])
        if not isinstance(value, list) or len(value) > MAX_REFERENCES:
            self._refuse("references", value, f"a list of at most {MAX_REFERENCES} captions")
        for caption in value:
            if not isinstance(caption, str):
                self._refuse("references", caption, "strings, one for each reference picture")
        return tuple(value)

    def captions(self) -> tuple[Caption, ...]:
        value = self._document.get("captions", [])
        if not isinstance(value, list):
            self._refuse("captions", value, "a list")
        return tuple(self._caption(item) for item in value)

    def _caption(self, item: object) -> Caption:
        if not isinstance(item, dict) or "text" not in item or not item.keys() <= CAPTION_FIELDS:
            self._refuse("captions", item, f"objects with 'text' and of {sorted(CAPTION_FIELDS)}")
        text, lang = item["text"], item.get("lang", "en")
        source, weight = item.get("source", ""), item.get("weight", 1.0)
        are_texts = type(text) is type(lang) is type(source) is str
        if are_texts and type(weight) is float and 0 <= weight < math.inf:
            return Caption(text, lang, source, weight)
        read = _Fields(self._key, item)
        weight = read._finite("captions.weight", item.get("weight", 1.0))
        if weight < 0:
            self._refuse("captions.weight", weight, "a number not below 0")
        return Caption(
            read.text("text", ""), read.text("lang", "en"), read.text("source", ""), weight
        )

    def _mapping(self, name: str) -> Mapping[str, Any]:
        value = self._document.get(name, {})
        if not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return cast(Mapping[str, Any], value)

    def _finite(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(name, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self._refuse(name, value, "a finite number")
        return number
