"""What a user has before packing: a folder of media with sidecar captions, or a table of them.

Folder: every medium below it; `clip.txt` beside `clip.mp4` is its caption, `clip.json` its caption
and more, `clip.ref0.png`, `clip.ref1.jpg`, ... are its reference pictures and `clip.ref0.txt` the
caption of one. Table: CSV, TSV or JSON lines with a `path` (relative to the table) and a `caption`.
Fields other than those below are kept with the record: numbers as scores, text as extra.

    caption or text   one caption
    captions          several (JSON only): strings, or objects {text, lang, source, weight}
    references        pictures (JSON only): paths, or objects {path, caption}
    lang, source, licence (or license), key
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinodit.data.meta import CAPTION_FIELDS
from kinodit.data.record import MEDIA_MEMBERS, Caption
from kinodit.models.errors import UserError

TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}

REMUXED: Mapping[str, str] = {".mov": "mov", ".mkv": "matroska", ".avi": "avi"}
"""Containers that shards do not have, with FFmpeg's name of their demuxer: their streams are copied
into an mp4."""

MEMBER_OF_SUFFIX: Mapping[str, str] = {
    **{f".{name}": name for names in MEDIA_MEMBERS.values() for name in names},
    ".jpeg": "jpg",
    ".m4v": "mp4",
    **dict.fromkeys(REMUXED, "mp4"),
}
_PICTURES = {s for s, member in MEMBER_OF_SUFFIX.items() if member in MEDIA_MEMBERS["image"]}
_UNSUPPORTED = "mp3 m4a aac ogg wma gif bmp tif tiff heic avif wmv flv mpg mpeg ts 3gp"
UNSUPPORTED_SUFFIXES = frozenset(f".{name}" for name in _UNSUPPORTED.split())
_PATH, _CAPTION, _LICENCE = ("path", "file"), ("caption", "text"), ("licence", "license")
_NAMED = {*_PATH, *_CAPTION, *_LICENCE, "captions", "references", "lang", "source", "key"}
_REFERENCE_STEM = re.compile(r"(.*)\.ref(\d+)", re.DOTALL)


class SourceError(UserError):
    """A folder or table that cannot be packed, or one entry of it; the message names the place."""


@dataclass(frozen=True)
class SourceItem:
    """One medium to pack. `name` is its path as the user wrote it, relative to the source."""

    path: Path
    name: str
    key: str
    captions: tuple[Caption, ...]
    scores: dict[str, float]
    extra: dict[str, str]
    source: str
    licence: str
    references: tuple[SourceReference, ...] = ()


@dataclass(frozen=True)
class SourceReference:
    """A reference picture of an item; `caption` may be empty."""

    path: Path
    name: str
    caption: str


class Source:
    """A folder or table of captioned media. Iterating yields items, or a SourceError for a bad one.

    Order is that of sorted paths, or of the table's rows. Keys are made from names; equal ones are
    told apart by a hash. Raises SourceError if there is nothing to pack.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.ignored: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._references: dict[Path, list[Path]] = {}
        if self.path.is_dir():
            self._entries: list[tuple[str, Path | Mapping[str, Any]]] = list(self._scan_folder())
            self._check_references()
        elif self.path.is_file() and self.path.suffix in TABLE_SUFFIXES:
            self._entries = list(_read_table(self.path))
        else:
            found = "it does not exist" if not self.path.exists() else "it is neither"
            raise SourceError(
                f"{self.path} is not a folder or a table ({', '.join(TABLE_SUFFIXES)}): {found}"
            )
        if not self._entries:
            seen = ", ".join(f"{count} {suffix}" for suffix, count in self.ignored.most_common(5))
            raise SourceError(
                f"{self.path} holds no media to pack (found: {seen or 'nothing'}); media are "
                f"{', '.join(MEMBER_OF_SUFFIX)}"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SourceItem | SourceError]:
        for name, entry in self._entries:
            try:
                yield self._item(name, entry)
            except SourceError as error:
                yield error

    def _scan_folder(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if path.is_dir() or any(part.startswith(".") for part in relative.parts):
                continue
            suffix = path.suffix.lower()
            if suffix in _PICTURES and _REFERENCE_STEM.fullmatch(path.stem):
                self._references.setdefault(_medium_of(path), []).append(path)
            elif suffix in MEMBER_OF_SUFFIX or suffix in UNSUPPORTED_SUFFIXES:
                yield str(relative), path
            elif suffix not in (".txt", ".json"):
                self.ignored[suffix or path.name] += 1

    def _item(self, name: str, entry: Path | Mapping[str, Any]) -> SourceItem:
        if isinstance(entry, Path):
            path, columns = entry, _sidecars(name, entry)
        else:
            columns = entry
            written = str(_first(columns, _PATH) or "")
            if not written:
                raise SourceError(f"{name}: it has no 'path'")
            path, name = self.path.parent / written, written
        if path.suffix.lower() not in MEMBER_OF_SUFFIX:
            raise SourceError(
                f"{name}: files of type {path.suffix or '(none)'} cannot be packed; convert it "
                f"to one of {', '.join(MEMBER_OF_SUFFIX)}"
            )
        if not path.is_file():
            raise SourceError(f"{name}: there is no such file")
        beside = self._references.get(path.with_suffix(""), []) if isinstance(entry, Path) else []
        scores, extra = _kept(name, columns)
        return SourceItem(
            path=path,
            name=name,
            key=self._unique_key(str(columns.get("key") or name)),
            captions=_captions(name, columns),
            scores=scores,
            extra=extra,
            source=str(columns.get("source") or ""),
            licence=str(_first(columns, _LICENCE) or ""),
            references=(
                _references_beside(name, beside)
                if beside
                else _references_named(name, columns, self._root(entry))
            ),
        )

    def _root(self, entry: Path | Mapping[str, Any]) -> Path:
        """What paths of reference pictures are relative to: the table's folder, or the medium's."""
        return entry.parent if isinstance(entry, Path) else self.path.parent

    def _check_references(self) -> None:
        """Pictures that belong to no medium would be left out without a word."""
        media = {entry.with_suffix("") for _, entry in self._entries if isinstance(entry, Path)}
        lost = sorted(self._references.keys() - media)
        if lost:
            picture = self._references[lost[0]][0].relative_to(self.path)
            raise SourceError(
                f"{picture} is a reference picture by its name, but beside it is no medium "
                f"{lost[0].name}.*: add that, or give the picture another name"
            )

    def _unique_key(self, name: str) -> str:
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix else name
        key = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-")[:100] or "sample"
        if key in self._keys:
            key = f"{key}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        if key in self._keys:
            raise SourceError(f"{name}: it occurs twice")
        self._keys.add(key)
        return key


def _read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    delimiter = TABLE_SUFFIXES[path.suffix]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if delimiter:
                reader = csv.DictReader(file, delimiter=delimiter)
                columns = reader.fieldnames or []
                if not set(_PATH) & set(columns) or not set(_CAPTION) & set(columns):
                    raise SourceError(
                        f"{path} needs the columns 'path' and 'caption'; it has {list(columns)}"
                    )
                for row in reader:
                    yield f"{path.name} line {reader.line_num}", row
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise SourceError(f"{path} line {number} is not a JSON object")
                yield f"{path.name} line {number}", row
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _sidecars(name: str, path: Path) -> Mapping[str, Any]:
    columns: dict[str, Any] = {}
    text, document = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if document.is_file():
            loaded = json.loads(document.read_text(encoding="utf-8"))
            if not isinstance(loaded, dict):
                raise SourceError(f"{name}: {document.name} is not a JSON object")
            columns.update(loaded)
        if text.is_file() and not {"captions", *_CAPTION} & set(columns):
            columns["caption"] = text.read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{name}: its caption file cannot be read: {error}") from error
    return columns


def _medium_of(picture: Path) -> Path:
    """The path, without its suffix, of the medium that a reference picture is named after."""
    found = _REFERENCE_STEM.fullmatch(picture.stem)
    assert found is not None
    return picture.with_name(found[1])


def _references_beside(name: str, pictures: list[Path]) -> tuple[SourceReference, ...]:
    """Reference pictures of a folder, by their numbers: from 0 without a gap."""
    found: dict[int, Path] = {}
    for path in pictures:
        number = int(path.stem.rpartition(".ref")[2])
        if number in found:
            raise SourceError(f"{name}: there are both {found[number].name} and {path.name}")
        found[number] = path
    if sorted(found) != list(range(len(found))):
        raise SourceError(
            f"{name}: its reference pictures have the numbers {sorted(found)}; they begin with 0 "
            "and have no gap"
        )
    references = []
    for _, path in sorted(found.items()):
        caption = str(_sidecars(path.name, path).get("caption") or "")
        references.append(SourceReference(path, path.name, " ".join(caption.split())))
    return tuple(references)


def _references_named(
    name: str, columns: Mapping[str, Any], root: Path
) -> tuple[SourceReference, ...]:
    """Reference pictures that a table or a JSON file names."""
    found = columns.get("references") or []
    if not isinstance(found, list):
        raise SourceError(f"{name}: 'references' must be a list")
    references = []
    for item in found:
        parts = {"path": item} if isinstance(item, str) else item
        if (
            not isinstance(parts, dict)
            or set(parts) - {"path", "caption"}
            or not isinstance(parts.get("path"), str)
        ):
            raise SourceError(f"{name}: a reference must be a path or an object {{path, caption}}")
        path = root / parts["path"]
        if path.suffix.lower() not in _PICTURES or not path.is_file():
            raise SourceError(
                f"{name}: its reference {parts['path']!r} is not a file of "
                f"{', '.join(sorted(_PICTURES))}"
            )
        caption = " ".join(str(parts.get("caption") or "").split())
        references.append(SourceReference(path, parts["path"], caption))
    return tuple(references)


def _captions(name: str, columns: Mapping[str, Any]) -> tuple[Caption, ...]:
    found = columns.get("captions")
    if found is None:
        found = [_first(columns, _CAPTION) or ""]
    if not isinstance(found, list):
        raise SourceError(f"{name}: 'captions' must be a list")
    captions = []
    for item in found:
        parts = {"text": item} if isinstance(item, str) else item
        if not isinstance(parts, dict) or set(parts) - CAPTION_FIELDS or "text" not in parts:
            raise SourceError(
                f"{name}: a caption must be a string or an object of {sorted(CAPTION_FIELDS)}"
            )
        values = {"lang": str(columns.get("lang") or "en"), **parts}
        text = " ".join(str(values.pop("text")).split())
        if text:
            captions.append(Caption(text, **values))
    return tuple(captions)


def _kept(name: str, columns: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Scores and extra: columns that are not named in the module's table."""
    scores: dict[str, float] = {}
    extra: dict[str, str] = {}
    for column, value in columns.items():
        if column is None:
            raise SourceError(f"{name}: the row has more cells than the table has columns")
        if column in _NAMED or value is None or value == "":
            continue
        if column in ("scores", "extra") and isinstance(value, dict):
            inner_scores, inner_extra = _kept(name, value)
            scores.update(inner_scores)
            extra.update(inner_extra)
            continue
        number = _number(value)
        if number is not None:
            scores[str(column)] = number
        else:
            extra[str(column)] = value if isinstance(value, str) else json.dumps(value)
    return scores, extra


def _number(value: object) -> float | None:
    if not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _first(columns: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((columns[name] for name in names if columns.get(name)), None)
