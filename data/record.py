"""The record contract: what one sample of a shard holds, and the checks it must pass.

A sample is a run of adjacent tar members `KEY.EXTENSION` with one key: one medium (or cached
tensors as safetensors), `KEY.json` (`RecordMeta`) and `KEY.txt` (its first caption, so that any
WebDataset reader finds it). A video or an image may bring reference pictures along, `KEY.ref0.png`,
`KEY.ref1.jpg`, ... in their order. Members are an allow-list: nothing that could execute code when
it is parsed is read, and no name from a shard is ever used as a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from msgspec import Struct, structs

from kinodit.data.checksums import Bytes
from kinodit.data.foreign import foreign_meta, require_success
from kinodit.data.meta import (
    MAX_REFERENCES,
    MAX_SIDE,
    MODALITIES,
    SCHEMA,
    Caption,
    Modality,
    RecordError,
    RecordMeta,
    document_of,
    parse_meta,
)
from kinodit.data.usual_meta import usual_meta

__all__ = [
    "MAX_SIDE",
    "MODALITIES",
    "SCHEMA",
    "Caption",
    "Modality",
    "Record",
    "RecordError",
    "RecordMeta",
    "encode_record",
    "parse_meta",
    "parse_record",
]

MEDIA_MEMBERS: Mapping[Modality, tuple[str, ...]] = {
    "video": ("mp4", "webm"),
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "opus"),
}
UNUSED_MEMBERS = ("cls", "id", "url", "m4a", "mp3")
"""What other tools add to a sample: a class, where it came from, the sound of its video again."""
KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,128}")
TENSOR_MEMBER_PATTERN = re.compile(r"[a-z0-9_]{1,32}\.safetensors")
REFERENCE_PATTERN = re.compile(
    rf"ref([0-{MAX_REFERENCES - 1}])\.({'|'.join(MEDIA_MEMBERS['image'])})"
)

_ALLOWED_MEMBERS = frozenset({"json", "txt", *UNUSED_MEMBERS}.union(*MEDIA_MEMBERS.values()))
_TEXTS = frozenset({"json", "txt"})
_APART = frozenset({"json", "txt", *UNUSED_MEMBERS})
"""Members that a `Record` does not hold."""

MAX_MEMBERS = 16
MAX_MEMBER_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.?)*"?|[\[\]{}]', re.DOTALL)
"""Strings, in which brackets mean nothing, and brackets."""


class Record(Struct, frozen=True, gc=False):
    """One sample: `members` maps an extension ("mp4", "latent.safetensors") to its bytes.

    A medium that was read from a shard is a view of the sample's bytes: nothing is copied.
    `json` and `txt` are not among the members: they are `meta`.
    """

    key: str
    meta: RecordMeta
    members: Mapping[str, Bytes]

    @property
    def medium(self) -> tuple[str, Bytes] | None:
        """(extension, bytes) of the medium; None if the record has tensors only."""
        for name in MEDIA_MEMBERS[self.meta.modality]:
            if name in self.members:
                return name, self.members[name]
        return None

    @property
    def references(self) -> list[tuple[str, Bytes]]:
        """(member name, bytes) of the reference pictures, in their order."""
        return [(name, self.members[name]) for name in _reference_members(self.members)]


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
    if name in _ALLOWED_MEMBERS:
        return name
    if not (TENSOR_MEMBER_PATTERN.fullmatch(name) or REFERENCE_PATTERN.fullmatch(name)):
        raise RecordError(
            f"sample {key!r}: member {name[:160]!r} is not allowed; allowed are "
            f"{', '.join(sorted(_ALLOWED_MEMBERS))}, NAME.safetensors, and ref0 to "
            f"ref{MAX_REFERENCES - 1} with {', '.join(MEDIA_MEMBERS['image'])}"
        )
    return name


def parse_record(key: str, members: Mapping[str, Bytes]) -> Record:
    """The record of the members of one sample. Nothing is unpickled, decoded or hashed.

    A sample without `json`, or whose JSON has no `schema`, comes from another tool
    (`kinodit.data.foreign`). Members that such tools add and nobody needs are left out.

    Raises RecordError that names the key and what is wrong.
    """
    check_key(key)
    if len(members) > MAX_MEMBERS:
        raise RecordError(f"sample {key!r} has {len(members)} members; {MAX_MEMBERS} are allowed")
    if not _ALLOWED_MEMBERS.issuperset(members):
        for name in members:
            check_member(key, name)
    for name, payload in members.items():
        size = len(payload)
        if size > MAX_TEXT_BYTES and (name in _TEXTS or size > MAX_MEMBER_BYTES):
            limit = MAX_TEXT_BYTES if name in _TEXTS else MAX_MEMBER_BYTES
            raise RecordError(
                f"sample {key!r}: member {name!r} has {size} bytes; {limit} are allowed"
            )
    said = members.get("json")
    meta = usual_meta(bytes(said)) if said is not None else None
    if meta is None:
        document = _parse_json(key, bytes(said)) if said is not None else {}
        if "schema" in document:
            meta = parse_meta(key, document)
        else:
            meta = _foreign_meta(key, members, document)
    rest = {name: data for name, data in members.items() if name not in _APART}
    _check_media(key, meta, rest)
    return Record(key, meta, rest)


def encode_record(record: Record) -> dict[str, str | bytes]:
    """The record as a WebDataset sample: `__key__` and the bytes of each member.

    The same record gives the same bytes. Raises RecordError if it would not parse again.
    """
    document = document_of(record.meta)
    if not record.meta.references:
        # Records without any keep the bytes that they had before there were references.
        del document["references"]
    try:
        text = json.dumps(
            document, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except ValueError as error:
        raise RecordError(f"sample {record.key!r}: a number of its JSON is not finite") from error
    members = {name: bytes(data) for name, data in record.members.items()}
    members["json"] = text.encode()
    if record.meta.captions:
        members["txt"] = record.meta.captions[0].text.encode()
    parse_record(record.key, members)
    return {"__key__": record.key, **members}


class _NoNumberError(ValueError):
    """A constant that JSON does not have: NaN, Infinity."""


def _refuse(constant: str) -> NoReturn:
    raise _NoNumberError(constant)


_JSON = json.JSONDecoder(parse_constant=_refuse)


def _parse_json(key: str, payload: bytes) -> dict[str, Any]:
    if _is_deep(payload):
        raise RecordError(f"sample {key!r}: its JSON is nested more than {MAX_JSON_DEPTH} deep")
    try:
        document = _JSON.decode(payload.decode(json.detect_encoding(payload), "surrogatepass"))
    except _NoNumberError as error:
        raise RecordError(
            f"sample {key!r}: its JSON holds {error}, which is not a number"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"sample {key!r}: its JSON cannot be parsed: {error}") from error
    if _may_hold_surrogates(payload) and not _is_unicode(document):
        raise RecordError(
            f"sample {key!r}: its JSON holds half of a surrogate pair, which no text of Unicode has"
        )
    if not isinstance(document, dict):
        raise RecordError(
            f"sample {key!r}: its JSON is a {type(document).__name__}; it must be an object"
        )
    return cast(dict[str, Any], document)


def _may_hold_surrogates(payload: bytes) -> bool:
    """Whether they are escaped, written as if they were UTF-8, or it is UTF-16 or 32."""
    return any(mark in payload for mark in (b"\\ud", b"\\uD", b"\xed", b"\0"))


def _is_unicode(document: object) -> bool:
    """Whether its text can be written: halves of pairs would end whatever encodes a caption."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deep(payload: bytes) -> bool:
    """Whether objects and lists are nested above `MAX_JSON_DEPTH`, told without parsing."""
    if payload.count(b"{") + payload.count(b"[") <= MAX_JSON_DEPTH:
        return False
    depth = 0
    for mark in _BRACKETS.findall(payload):
        if mark in b"{[":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                return True
        elif mark in b"}]":
            depth -= 1
    return False


def _foreign_meta(
    key: str, members: Mapping[str, Bytes], document: Mapping[str, Any]
) -> RecordMeta:
    require_success(key, document)
    for modality in MODALITIES:
        if any(name in members for name in MEDIA_MEMBERS[modality]):
            break
    else:
        raise RecordError(
            f"sample {key!r} has no medium and no JSON of schema {SCHEMA}; "
            f"its members are {sorted(members)}"
        )
    text = None
    if "txt" in members:
        try:
            text = bytes(members["txt"]).decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"sample {key!r}: its txt is not UTF-8: {error}") from error
    meta = foreign_meta(key, modality, text, document)
    return structs.replace(meta, references=("",) * len(_reference_members(members)))


def _reference_members(members: Mapping[str, Bytes]) -> list[str]:
    """Names of the reference pictures, by number."""
    return sorted(name for name in members if REFERENCE_PATTERN.fullmatch(name))


def _check_media(key: str, meta: RecordMeta, members: Mapping[str, Bytes]) -> None:
    allowed = MEDIA_MEMBERS[meta.modality]
    if len(members) == 1 and not meta.references and next(iter(members)) in allowed:
        return
    media = [name for name in members if name in allowed]
    has_tensors = any(TENSOR_MEMBER_PATTERN.fullmatch(name) for name in members)
    if len(media) > 1 or not (media or has_tensors):
        raise RecordError(
            f"sample {key!r} is of modality {meta.modality!r} and must have exactly one of "
            f"{', '.join(allowed)}; its members are {sorted(members)}"
        )
    references = _reference_members(members)
    if references and meta.modality == "audio":
        raise RecordError(f"sample {key!r} is a sound and has reference pictures: {references}")
    if [name.partition(".")[0] for name in references] != [
        f"ref{number}" for number in range(len(references))
    ]:
        raise RecordError(
            f"sample {key!r} must have one picture each of ref0, ref1, ... without a gap; it has "
            f"{references}"
        )
    # Cached tensors hold what the pictures were encoded to.
    if len(references) != len(meta.references) and (references or media):
        raise RecordError(
            f"sample {key!r} has {len(references)} reference pictures, its JSON speaks of "
            f"{len(meta.references)}"
        )
