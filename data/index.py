"""Indexes of shards: where each sample lies and what the planner needs to know of it.

An index is one `INDEX_DTYPE` row per sample and nothing else, so that it can be memory-mapped. It
is made while a shard is written, or by reading any shard that meets the record contract.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinodit.data.checksums import Digest, crc32
from kinodit.data.foreign import FailedSampleError
from kinodit.data.probe import MediumError, Probe, probe, with_facts
from kinodit.data.record import MODALITIES, Modality, Record, RecordError, RecordMeta, parse_record
from kinodit.data.tar import TarError, TarMember, members
from kinodit.data.usual_record import usual_record
from kinodit.models.errors import UserError

MAX_SAMPLE_BYTES = (1 << 32) - 1
HASHED_BYTES = 1 << 18
"""Pieces in which a shard is hashed: many enough for its vector units, few enough to stay near."""

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("num_frames", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("fps_milli", "<u4"),
        ("duration_ms", "<u4"),
        ("caption_chars", "<u2"),
        ("modality", "u1"),
        ("flags", "u1"),
        ("crc32", "<u4"),
    ]
)
FLAG_AUDIO = 1


class ManifestError(UserError):
    """A dataset on disk that is missing, damaged or not what its manifest says."""


@dataclass(frozen=True)
class Damage:
    """A part of a shard that is left out: its first byte, the sample's key ("" unknown), why."""

    offset: int
    key: str
    reason: str


class Row(NamedTuple):
    """One row of an index: bytes `offset` to `offset + size` of a shard hold one whole sample.

    `modality` is an index into `record.MODALITIES`, `caption_chars` the length of the first
    caption, `crc32` that of the sample's bytes, headers and padding included.
    """

    offset: int
    size: int
    num_frames: int
    height: int
    width: int
    fps_milli: int
    duration_ms: int
    caption_chars: int
    modality: int
    flags: int
    crc32: int

    @property
    def modality_name(self) -> Modality:
        """The modality as in the record."""
        return MODALITIES[self.modality]

    @property
    def has_audio(self) -> bool:
        """Whether the sample has sound."""
        return bool(self.flags & FLAG_AUDIO)


class Span(NamedTuple):
    """The members of one sample, adjacent in a shard, and the bytes it occupies there."""

    key: str
    start: int
    end: int
    members: Mapping[str, TarMember]


def spans(buffer: bytes | memoryview, *, whole: bool) -> Iterator[Span]:
    """The samples of a shard (or of a run of whole samples cut out of one), in order.

    Raises TarError or RecordError: the key and extension of a member are what is before and after
    the *first* dot of its name, and each key may occur in one run only.
    """
    seen: set[str] = set()
    key = ""
    found: dict[str, TarMember] = {}
    start = end = 0
    for member in members(buffer, whole=whole):
        name, _, extension = member.name.partition(".")
        if name != key or not found:
            if found:
                yield Span(key, start, end, found)
            if name in seen:
                raise RecordError(
                    f"sample {name[:160]!r} at byte {member.start} was there before: the members "
                    "of a sample must be adjacent and keys unique"
                )
            seen.add(name)
            key, found, start = name, {}, member.start
        if extension in found:
            raise RecordError(f"sample {key[:160]!r} has two members {extension[:160]!r}")
        found[extension] = member
        end = member.end
    if found:
        yield Span(key, start, end, found)


def read_sample(buffer: bytes) -> Record:
    """The record of the one sample that `buffer` is. Raises TarError or RecordError.

    Whoever has read these bytes has compared a checksum of them: that of the index, or those of the
    headers, which of usual samples are not looked at again. Members may be views of `buffer`.
    """
    usual = usual_record(buffer)
    if usual is not None:
        return usual
    found = list(spans(buffer, whole=False))
    if len(found) != 1:
        raise RecordError(f"these bytes hold {len(found)} samples, not one")
    return read_span(buffer, found[0])


def read_span(buffer: bytes | memoryview, span: Span) -> Record:
    """The record of one span of `buffer`. Raises RecordError."""
    # What is cut out of bytes is bytes already, and not copied again.
    payloads = {
        name: bytes(buffer[member.data : member.data + member.size])
        for name, member in span.members.items()
    }
    return parse_record(span.key, payloads)


def read_meta(buffer: bytes | memoryview, span: Span, opener: Probe = probe) -> RecordMeta:
    """The metadata of one span, of which a medium is copied only if it has to be opened.

    Raises RecordError or MediumError.
    """
    view = memoryview(buffer)
    parts: dict[str, Any] = {}
    for name, member in span.members.items():
        payload = view[member.data : member.data + member.size]
        parts[name] = bytes(payload) if name in ("json", "txt") else payload
    record = parse_record(span.key, parts)
    return record.meta if record.meta.is_probed else known_meta(read_span(buffer, span), opener)


def index_row(meta: RecordMeta, start: int, data: memoryview) -> Row:
    """The index row of a sample of which `data` is every byte, at byte `start` of its shard."""
    if len(data) > MAX_SAMPLE_BYTES:
        raise RecordError(
            f"sample {meta.id!r} has {len(data)} bytes; {MAX_SAMPLE_BYTES} are allowed"
        )
    caption_chars = len(meta.captions[0].text) if meta.captions else 0
    return Row(
        offset=start,
        size=len(data),
        num_frames=meta.num_frames,
        height=meta.height,
        width=meta.width,
        fps_milli=round(meta.fps * 1000),
        duration_ms=round(meta.duration_s * 1000),
        caption_chars=min(caption_chars, (1 << 16) - 1),
        modality=MODALITIES.index(meta.modality),
        flags=FLAG_AUDIO if meta.has_audio else 0,
        crc32=crc32(data),
    )


def build_index(
    tar_path: Path | str,
    *,
    seen: Callable[[int], None] = lambda offset: None,
    left_out: Callable[[Damage], None] = lambda damage: None,
    without: Collection[str] = (),
    digest: Digest | None = None,
    opener: Probe = probe,
) -> NDArray[np.void]:
    """The index of a shard, made by reading the shard itself: [samples] of `INDEX_DTYPE`.

    A medium is opened only where the record does not say its size and length.

    Args:
        tar_path: the shard.
        seen: called with the byte after each sample.
        left_out: called with samples that their own tool could not get.
        without: keys of samples that are wanted in no index.
        digest: takes all bytes of the shard, while they are in the processor's cache.
        opener: opens media.

    Raises:
        ManifestError: it breaks the contract; names the file and, where it has one, the byte offset
            of the fault.
    """
    path = Path(tar_path)
    view = shard_bytes(path)
    if not view:
        raise ManifestError(f"{path} is empty (0 bytes): it is not a tar archive")
    rows: list[Row] = []
    hashed = 0
    try:
        for span in spans(view, whole=True):
            if digest is not None and span.end - hashed >= HASHED_BYTES:
                digest.update(view[hashed : span.end])
                hashed = span.end
            if span.key not in without:
                try:
                    meta = read_meta(view, span, opener)
                    rows.append(index_row(meta, span.start, view[span.start : span.end]))
                except FailedSampleError as error:
                    left_out(Damage(span.start, span.key, str(error)))
            seen(span.end)
    except (TarError, RecordError, MediumError) as error:
        raise ManifestError(f"{path}: {error}") from error
    if digest is not None:
        digest.update(view[hashed:])
    return np.array(rows, dtype=INDEX_DTYPE)


def shard_bytes(path: Path) -> memoryview:
    """The bytes of a shard, mapped. Raises ManifestError if it cannot be read."""
    try:
        return np.memmap(path, np.uint8, "r").data if path.stat().st_size else memoryview(b"")
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def known_meta(record: Record, opener: Probe = probe) -> RecordMeta:
    """The record's metadata; of the medium itself where they do not say its size and length.

    Raises MediumError.
    """
    if record.meta.is_probed or record.medium is None:
        return record.meta
    try:
        return with_facts(record.meta, opener(*record.medium))
    except MediumError as error:
        raise MediumError(f"sample {record.key!r}: {error}") from error
