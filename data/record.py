"""The record contract: what one sample of a shard holds, and the checks it must pass.

A sample is a run of adjacent tar members `KEY.EXTENSION` with one key: one medium (or cached
tensors as safetensors), `KEY.json` (`RecordMeta`) and `KEY.txt` (its first caption, so that any
WebDataset reader finds it). Members are an allow-list: nothing that could execute code when it is
parsed is read, and no name from a shard is ever used as a path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn, cast

from kinodit.models.errors import UserError

Modality = Literal["video", "image", "audio"]
MODALITIES: tuple[Modality, ...] = ("video", "image", "audio")

MEDIA_MEMBERS: Mapping[Modality, tuple[str, ...]] = {
    "video": ("mp4", "webm"),
    "image": ("jpg", "png", "webp"),
    "audio": ("flac", "wav", "opus"),
}
KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,128}")
TENSOR_MEMBER_PATTERN = re.compile(r"[a-z0-9_]{1,32}\.safetensors")

SCHEMA = 1
MAX_MEMBERS = 16
MAX_MEMBER_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 20
MAX_SIDE = 16_384
MAX_FRAMES = 10_000_000
MAX_DURATION_S = 4_000_000.0


class RecordError(UserError):
    """A sample that breaks the record contract; the message names its key and the field."""


@dataclass(frozen=True)
class Caption:
    """One description of a sample. `weight` is its share when one of several is drawn."""

    text: str
    lang: str = "en"
    source: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class RecordMeta:
    """`KEY.json`, version 1. A zero in `width` ... `sample_rate` means "none or not known".

    fps is frames per second, duration_s seconds, sample_rate Hz (of the sound). `scores` are
    numbers to filter on (motion, aesthetic, onset_s, ...), `extra` are strings that describe the
    sample's origin, `sha256` maps a member name to the hex digest of its bytes.
    """

    id: str
    modality: Modality
    width: int = 0
    height: int = 0
    fps: float = 0.0
    num_frames: int = 0
    duration_s: float = 0.0
    has_audio: bool = False
    sample_rate: int = 0
    captions: tuple[Caption, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    sha256: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def is_probed(self) -> bool:
        """Whether size and length are known; a shard made by another tool need not say them."""
        if self.modality == "audio":
            return self.duration_s > 0
        known_size = self.width > 0 and self.height > 0
        return known_size and (self.modality == "image" or self.num_frames > 0)


@dataclass(frozen=True)
class Record:
    """One sample: `members` maps an extension ("mp4", "latent.safetensors") to its bytes.

    `json` and `txt` are not among the members: they are `meta`.
    """

    key: str
    meta: RecordMeta
    members: dict[str, bytes]

    @property
    def medium(self) -> tuple[str, bytes] | None:
        """(extension, bytes) of the medium; None if the record has tensors only."""
        for name in MEDIA_MEMBERS[self.meta.modality]:
            if name in self.members:
                return name, self.members[name]
        return None


def check_key(key: str) -> str:
    """`key` itself. Raises RecordError if it is not a valid sample key."""
    if not KEY_PATTERN.fullmatch(key):
        raise RecordError(
            f"sample key {key[:160]!r} is not allowed: keys are 1 to 128 characters of "
            "a-z, 0-9, '_' and '-' (`kinodit data pack` makes such keys)"
        )
    return key


def check_member(key: str, name: str) -> str:
    """`name` itself. Raises RecordError if no sample may have a member of that name."""
    allowed = {"json", "txt"}.union(*MEDIA_MEMBERS.values())
    if name not in allowed and not TENSOR_MEMBER_PATTERN.fullmatch(name):
        raise RecordError(
            f"sample {key!r}: member {name[:160]!r} is not allowed; allowed are "
            f"{', '.join(sorted(allowed))} and NAME.safetensors"
        )
    return name


def parse_record(key: str, members: Mapping[str, bytes]) -> Record:
    """The record of the members of one sample. Nothing is unpickled, decoded or hashed.

    A sample without `json`, or whose JSON has no `schema`, comes from another tool: its caption is
    its `txt` (or the JSON's "caption" or "text"), its geometry is left unknown (zero).

    Raises RecordError that names the key and what is wrong.
    """
    check_key(key)
    if len(members) > MAX_MEMBERS:
        raise RecordError(f"sample {key!r} has {len(members)} members; {MAX_MEMBERS} are allowed")
    for name, payload in members.items():
        check_member(key, name)
        limit = MAX_TEXT_BYTES if name in ("json", "txt") else MAX_MEMBER_BYTES
        if len(payload) > limit:
            raise RecordError(
                f"sample {key!r}: member {name!r} has {len(payload)} bytes; {limit} are allowed"
            )
    document = _parse_json(key, members["json"]) if "json" in members else {}
    if "schema" in document:
        meta = parse_meta(key, document)
    else:
        meta = _foreign_meta(key, members, document)
    rest = {name: data for name, data in members.items() if name not in ("json", "txt")}
    _check_media(key, meta, rest)
    return Record(key, meta, rest)


def encode_record(record: Record) -> dict[str, str | bytes]:
    """The record as a WebDataset sample: `__key__` and the bytes of each member.

    The same record gives the same bytes. Raises RecordError if it would not parse again.
    """
    document = {item.name: getattr(record.meta, item.name) for item in fields(record.meta)}
    document["captions"] = [vars(caption) for caption in record.meta.captions]
    try:
        text = json.dumps(
            document, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except ValueError as error:
        raise RecordError(f"sample {record.key!r}: a number of its JSON is not finite") from error
    members = {**record.members, "json": text.encode()}
    if record.meta.captions:
        members["txt"] = record.meta.captions[0].text.encode()
    parse_record(record.key, members)
    return {"__key__": record.key, **members}


def parse_meta(key: str, document: Mapping[str, Any]) -> RecordMeta:
    """`RecordMeta` of a decoded JSON object with a `schema`. Raises RecordError."""
    if document["schema"] != SCHEMA:
        raise RecordError(
            f"sample {key!r}: its JSON is of schema {document['schema']!r}; "
            f"this version of kinodit reads schema {SCHEMA}"
        )
    known = {item.name for item in fields(RecordMeta)}
    unknown = sorted(set(document) - known)
    if unknown:
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
        fps=read.number("fps", 1000.0),
        num_frames=read.integer("num_frames", MAX_FRAMES),
        duration_s=read.number("duration_s", MAX_DURATION_S),
        has_audio=read.flag("has_audio"),
        sample_rate=read.integer("sample_rate", 1_000_000),
        captions=read.captions(),
        scores=read.scores(),
        extra=read.strings("extra"),
        source=read.text("source", ""),
        licence=read.text("licence", ""),
        sha256=read.strings("sha256"),
    )


def _parse_json(key: str, payload: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise RecordError(f"sample {key!r}: its JSON holds {constant}, which is not a number")

    try:
        document = json.loads(payload, parse_constant=refuse)
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(f"sample {key!r}: its JSON cannot be parsed: {error}") from error
    if not isinstance(document, dict):
        raise RecordError(
            f"sample {key!r}: its JSON is a {type(document).__name__}; it must be an object"
        )
    return cast(dict[str, Any], document)


def _foreign_meta(
    key: str, members: Mapping[str, bytes], document: Mapping[str, Any]
) -> RecordMeta:
    for modality in MODALITIES:
        if any(name in members for name in MEDIA_MEMBERS[modality]):
            break
    else:
        raise RecordError(
            f"sample {key!r} has no medium and no JSON of schema {SCHEMA}; "
            f"its members are {sorted(members)}"
        )
    if "txt" in members:
        try:
            caption = members["txt"].decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"sample {key!r}: its txt is not UTF-8: {error}") from error
    else:
        found = document.get("caption", document.get("text", ""))
        caption = found if isinstance(found, str) else ""
    captions = (Caption(caption.strip()),) if caption.strip() else ()
    return RecordMeta(id=key, modality=modality, captions=captions)


def _check_media(key: str, meta: RecordMeta, members: Mapping[str, bytes]) -> None:
    allowed = MEDIA_MEMBERS[meta.modality]
    media = [name for name in members if name in allowed]
    has_tensors = any(TENSOR_MEMBER_PATTERN.fullmatch(name) for name in members)
    if len(media) > 1 or not (media or has_tensors):
        raise RecordError(
            f"sample {key!r} is of modality {meta.modality!r} and must have exactly one of "
            f"{', '.join(allowed)}; its members are {sorted(members)}"
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
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            self._refuse(name, value, f"an integer from 0 to {limit}")
        return value

    def number(self, name: str, limit: float) -> float:
        value = self._finite(name, self._document.get(name, 0.0))
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

    def captions(self) -> tuple[Caption, ...]:
        value = self._document.get("captions", [])
        if not isinstance(value, list):
            self._refuse("captions", value, "a list")
        return tuple(self._caption(item) for item in value)

    def _caption(self, item: object) -> Caption:
        names = {part.name for part in fields(Caption)}
        if not isinstance(item, dict) or "text" not in item or set(item) - names:
            self._refuse("captions", item, f"objects with 'text' and of {sorted(names)}")
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
