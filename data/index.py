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

from kinodit.data.checksums import PIECE_BYTES, Digest, SpanSums, crc32
from kinodit.data.foreign import FailedSampleError
from kinodit.data.probe import MediumError, Probe, probe, with_facts
from kinodit.data.record import MODALITIES, Modality, Record, RecordError, RecordMeta, parse_record
from kinodit.data.row_facts import FLAG_AUDIO, facts_of, usual_facts
from kinodit.data.tar import TarError, named_members
from kinodit.data.usual_record import usual_record
from kinodit.models.errors import UserError

MAX_SAMPLE_BYTES = (1 << 32) - 1

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
    """A sample's bytes in a shard, and those of each of its members there, which are adjacent."""

    key: str
    start: int
    end: int
    members: Mapping[str, slice]


def spans(buffer: bytes | memoryview, *, whole: bool) -> Iterator[Span]:
    """The samples of a shard (or of a run of whole samples cut out of one), in order.

    Raises TarError or RecordError: the key and extension of a member are what is before and after
    the *first* dot of its name, and each key may occur in one run only.
    """
    seen: set[str] = set()
    key = ""
    found: dict[str, slice] = {}
    first = last = 0
    for name, extension, start, data, size, end in named_members(buffer, whole=whole):
        if name != key or not found:
            if found:
                yield Span(key, first, last, found)
            if name in seen:
                raise RecordError(
                    f"sample {name[:160]!r} at byte {start} was there before: the members "
                    "of a sample must be adjacent and keys unique"
                )
            seen.add(name)
            key, found, first = name, {}, start
        if extension in found:
            raise RecordError(f"sample {key[:160]!r} has two members {extension[:160]!r}")
        found[extension] = slice(data, data + size)
        last = end
    if found:
        yield Span(key, first, last, found)


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
    return parse_record(span.key, {name: bytes(buffer[at]) for name, at in span.members.items()})


def read_meta(buffer: bytes | memoryview, span: Span, opener: Probe = probe) -> RecordMeta:
    """The metadata of one span, of which a medium is copied only if it has to be opened.

    Raises RecordError or MediumError.
    """
    view = memoryview(buffer)
    parts: dict[str, Any] = {
        name: bytes(view[at]) if name in ("json", "txt") else view[at]
        for name, at in span.members.items()
    }
    record = parse_record(span.key, parts)
    return record.meta if record.meta.is_probed else known_meta(read_span(buffer, span), opener)


def index_row(meta: RecordMeta, start: int, data: memoryview) -> Row:
    """The index row of a sample of which `data` is every byte, at byte `start` of its shard."""
    return _row(meta, start, len(data), crc32(data))


def span_row(view: memoryview, span: Span, crc: int, opener: Probe) -> tuple[int, ...]:
    """What `index_row` makes of the metadata of a span with the CRC-32 `crc`, in fewer steps.

    Raises RecordError or MediumError.
    """
    size = span.end - span.start
    facts = usual_facts(span.key, span.members, view)
    if facts is None or size > MAX_SAMPLE_BYTES:
        return _row(read_meta(view, span, opener), span.start, size, crc)
    return span.start, size, *facts, crc


def _row(meta: RecordMeta, start: int, size: int, crc: int) -> Row:
    if size > MAX_SAMPLE_BYTES:
        raise RecordError(f"sample {meta.id!r} has {size} bytes; {MAX_SAMPLE_BYTES} are allowed")
    return Row(start, size, *facts_of(meta), crc)


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
        seen: called with the byte after a sample, each time that so much more was read that it
            tells something.
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
    rows: list[tuple[int, ...]] = []
    sums, told = SpanSums(view, digest), 0
    try:
        for span in spans(view, whole=True):
            crc = sums.crc32_to(span.end)
            if span.key not in without:
                try:
                    rows.append(span_row(view, span, crc, opener))
                except FailedSampleError as error:
                    left_out(Damage(span.start, span.key, str(error)))
            if span.end - told >= PIECE_BYTES:
                told = span.end
                seen(told)
    except (TarError, RecordError, MediumError) as error:
        raise ManifestError(f"{path}: {error}") from error
    sums.finish()
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
