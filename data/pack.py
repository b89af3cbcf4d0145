"""From a folder or table of captioned media to a dataset: `kinodit data pack`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from kinodit.data.manifest import Manifest
from kinodit.data.meta import MAX_REFERENCES
from kinodit.data.probe import MediumError, modality_of, with_facts
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.record import MAX_MEMBER_BYTES, Record, RecordError, RecordMeta
from kinodit.data.source import MEMBER_OF_SUFFIX, REMUXED, Source, SourceError, SourceItem
from kinodit.data.writer import DEFAULT_SHARD_BYTES, DatasetWriter
from kinodit.models.errors import UserError

MAX_REPORTED = 10


class PackError(UserError):
    """Media that could not be packed; the message lists them."""


@dataclass(frozen=True)
class Progress:
    """How far a pack is: media looked at, of how many, bytes written, media that were bad."""

    done: int
    total: int
    num_bytes: int
    num_bad: int


@dataclass(frozen=True)
class PackReport:
    """What was packed, and why each of the others was not."""

    manifest: Manifest
    num_bytes: int
    bad: tuple[str, ...]
    ignored: dict[str, int] = field(default_factory=dict)


def pack(
    source: Path | str,
    destination: Path | str,
    *,
    name: str = "",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    skip_bad: bool = False,
    allow_uncaptioned: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PackReport:
    """Packs the media of `source` into a new dataset at `destination`.

    Media are opened in a process of their own: one that hangs or crashes its decoder is bad like
    others.

    Raises PackError, and writes nothing, if a medium is bad and `skip_bad` is not set; up to
    `MAX_REPORTED` of them are looked for, so that one run shows them together.
    """
    if shard_bytes < 1:
        raise PackError(f"shard-mb is {shard_bytes >> 20}; it must be at least 1")
    items = Source(source)
    bad: list[str] = []
    with (
        DatasetWriter(destination, name, shard_bytes) as writer,
        closing(ProbeWorker()) as opener,
    ):
        for done, item in enumerate(items, 1):
            try:
                if isinstance(item, SourceError):
                    raise item
                record = _record(item, allow_uncaptioned, opener)
                if skip_bad or not bad:
                    writer.write(record)
            except (SourceError, PackError, RecordError) as error:
                bad.append(str(error))
                if not skip_bad and len(bad) == MAX_REPORTED:
                    break
            progress(Progress(done, len(items), writer.num_bytes, len(bad)))
        if bad and (not skip_bad or len(bad) == len(items)):
            raise PackError(_describe(bad, len(items), skip_bad))
    return PackReport(
        Manifest.load(Path(destination)), writer.num_bytes, tuple(bad), dict(items.ignored)
    )


def _describe(bad: list[str], total: int, skip_bad: bool) -> str:
    lines = "\n  ".join(bad[:MAX_REPORTED])
    if skip_bad:
        return f"none of the {total} media can be packed:\n  {lines}"
    more = " (there may be more)" if len(bad) == MAX_REPORTED else ""
    return (
        f"{len(bad)} of {total} media cannot be packed{more}; nothing was written. Mend them, or "
        f"leave such media out with --skip-bad:\n  {lines}"
    )


def _record(item: SourceItem, allow_uncaptioned: bool, opener: ProbeWorker) -> Record:
    if not item.captions and not allow_uncaptioned:
        raise PackError(
            f"{item.name}: it has no caption (a .txt or .json file beside it, or a 'caption' in "
            "the table); --allow-uncaptioned packs it without"
        )
    suffix = item.path.suffix.lower()
    extension = MEMBER_OF_SUFFIX[suffix]
    try:
        if item.path.stat().st_size > MAX_MEMBER_BYTES:
            raise PackError(f"{item.name}: it has more than {MAX_MEMBER_BYTES >> 20} MiB")
        data = item.path.read_bytes()
        if suffix in REMUXED:
            data = opener.remux(data, REMUXED[suffix])
        facts = opener.probe(extension, data)
    except (OSError, MediumError) as error:
        raise PackError(f"{item.name}: {error}") from error
    references = _references(item, opener)
    members = {extension: data, **references}
    meta = RecordMeta(
        id=item.name,
        modality=modality_of(extension),
        captions=item.captions,
        scores=item.scores,
        extra=item.extra,
        source=item.source,
        licence=item.licence,
        sha256={name: hashlib.sha256(part).hexdigest() for name, part in members.items()},
        references=tuple(reference.caption for reference in item.references),
    )
    return Record(item.key, with_facts(meta, facts), members)


def _references(item: SourceItem, opener: ProbeWorker) -> dict[str, bytes]:
    """Members of its reference pictures, each opened once."""
    if len(item.references) > MAX_REFERENCES:
        raise PackError(
            f"{item.name}: it has {len(item.references)} reference pictures; {MAX_REFERENCES} are "
            "allowed"
        )
    members = {}
    for number, reference in enumerate(item.references):
        extension = MEMBER_OF_SUFFIX[reference.path.suffix.lower()]
        try:
            data = reference.path.read_bytes()
            opener.probe(extension, data)
        except (OSError, MediumError) as error:
            raise PackError(f"{item.name}: {reference.name}: {error}") from error
        members[f"ref{number}.{extension}"] = data
    return members
