"""Indexing a damaged shard: what is whole is kept, what is lost is named.

Common readers end a shard at its first damaged header. Here the next header is looked for, and only
samples that the damage touches are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinodit.data.checksums import crc32
from kinodit.data.index import (
    INDEX_DTYPE,
    Damage,
    Span,
    shard_bytes,
    span_row,
)
from kinodit.data.probe import MediumError, Probe, probe
from kinodit.data.record import KEY_PATTERN, RecordError
from kinodit.data.tar import BLOCK, TarError, TarMember, members


@dataclass(frozen=True)
class _Run:
    """Adjacent members of one key; whether a damaged header is before or behind them."""

    span: Span
    before: bool
    behind: bool


def salvage(
    path: Path | str,
    *,
    seen: Callable[[int], None] = lambda offset: None,
    without: Collection[str] = (),
    opener: Probe = probe,
) -> tuple[NDArray[np.void], list[Damage]]:
    """(index of what is whole, [samples] of `INDEX_DTYPE`; what is not), by reading the shard.

    `seen` is called with the byte after each sample, `without` are keys that are not wanted,
    `opener` opens media.

    Raises ManifestError if it cannot be read at all.
    """
    view = shard_bytes(Path(path))
    found: list[Damage] = []
    runs = list(_runs(view, found))
    usual = {frozenset(run.span.members) for run in runs if not (run.before or run.behind)}
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.span.key] = counts.get(run.span.key, 0) + 1
    rows: list[tuple[int, ...]] = []
    for run in runs:
        span = run.span
        seen(span.end)
        if span.key in without:
            continue
        if counts[span.key] > 1:
            reason = "its members are not adjacent, or its key is used twice"
        elif (run.before or run.behind) and not _is_whole(view, span, usual):
            reason = f"beside a damaged header only {sorted(span.members)} are left of it"
        else:
            try:
                rows.append(span_row(view, span, crc32(view[span.start : span.end]), opener))
                continue
            except (RecordError, MediumError) as error:
                reason = str(error)
        found.append(Damage(span.start, span.key[:128], reason))
    found.sort(key=lambda damage: damage.offset)
    return np.array(rows, dtype=INDEX_DTYPE), found


def _is_whole(view: memoryview, span: Span, usual: set[frozenset[str]]) -> bool:
    """Whether a sample beside damage can have lost nothing that it needs.

    A record of ours says what it is; of others, members must be those of samples elsewhere.
    """
    if frozenset(span.members) in usual or not usual:
        return True
    said = span.members.get("json")
    text = bytes(view[said]) if said is not None else b""
    return b'"schema"' in text


def _runs(view: memoryview, damages: list[Damage]) -> Iterator[_Run]:
    """The samples between damages, which are added to `damages`."""
    is_after_damage = False
    pieces: list[tuple[list[TarMember], TarError | None]] = list(_pieces(view))
    for number, (piece, error) in enumerate(pieces):
        spans = list(_grouped(piece))
        for place, span in enumerate(spans):
            is_last = place == len(spans) - 1
            yield _Run(span, is_after_damage and place == 0, error is not None and is_last)
        if error is not None:
            offset = piece[-1].end if piece else _start_of(pieces, number)
            damages.append(Damage(offset, _hint(view, offset), str(error)))
        is_after_damage = error is not None


def _start_of(pieces: Sequence[tuple[list[TarMember], TarError | None]], number: int) -> int:
    ends = [piece[-1].end for piece, _ in pieces[:number] if piece]
    return ends[-1] if ends else 0


def _pieces(view: memoryview) -> Iterator[tuple[list[TarMember], TarError | None]]:
    """Runs of members that can be read, each with what ended it; None at the archive's end."""
    offset = 0
    while True:
        piece: list[TarMember] = []
        try:
            for member in members(view[offset:], whole=True):
                piece.append(_moved(member, offset))
        except TarError as error:
            yield piece, error
            start = (piece[-1].end if piece else offset) + BLOCK
            following = _next_header(view, start)
            if following is None:
                return
            offset = following
        else:
            yield piece, None
            return


def _moved(member: TarMember, by: int) -> TarMember:
    return member._replace(start=member.start + by, data=member.data + by, end=member.end + by)


def _next_header(view: memoryview, start: int) -> int | None:
    """The next offset at which a header of an allowed name lies."""
    for offset in range(start, len(view) - BLOCK, BLOCK):
        if bytes(view[offset + 257 : offset + 262]) != b"ustar":
            continue
        try:
            member = next(members(view[offset:], whole=True))
        except (TarError, StopIteration):
            continue
        if KEY_PATTERN.fullmatch(member.name.partition(".")[0]):
            return offset
    return None


def _grouped(piece: Sequence[TarMember]) -> Iterator[Span]:
    start = 0
    for place in range(1, len(piece) + 1):
        key = piece[start].name.partition(".")[0]
        if place == len(piece) or piece[place].name.partition(".")[0] != key:
            mine = piece[start:place]
            named = {
                member.name.partition(".")[2]: slice(member.data, member.data + member.size)
                for member in mine
            }
            if len(named) == len(mine):
                yield Span(key, mine[0].start, mine[-1].end, named)
            else:
                # Two members of one name: parsed as none, and told.
                yield Span(key, mine[0].start, mine[-1].end, {})
            start = place


def _hint(view: memoryview, offset: int) -> str:
    name = bytes(view[offset : offset + 100]).split(b".", 1)[0].decode(errors="replace")
    return name if KEY_PATTERN.fullmatch(name) else ""
