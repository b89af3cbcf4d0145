"""Strict reading of plain tar archives (USTAR and PAX), by offset.

Python's tarfile ends quietly at a damaged header in the middle of an archive, so a shard would
lose its tail without a word. Here every byte of an archive is accounted for or it is an error.
Header layout: POSIX.1-2017, `pax`, "ustar Interchange Format".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple
from zlib import adler32

from kinodit.data.record import MAX_MEMBER_BYTES
from kinodit.models.errors import UserError

BLOCK = 512
_ZERO_BLOCK = bytes(BLOCK)
_MAX_PAX_BYTES = 1 << 16
_HEADER = struct.Struct("100s24x12s12x8sc100x8s80x155s12x")
"""Name, size, checksum, type, magic and version, prefix."""
_PLAIN = re.compile(
    rb"(?=[^\0]{3,99}\0)(?=([a-z0-9_-]+)\.([a-z0-9_.]+)\0).{124}([0-7]{11})[\0 ].{12}"
    rb"([0-7]{6})\0 0.{100}ustar\x0000.{80}\0.{166}",
    re.DOTALL,
)
"""The header of a regular file `KEY.EXTENSION` without a prefix, as nearly all are written.

Key, extension, size and checksum. The name ends within its 100 bytes."""
_USUAL_HEADER = (
    rb"(?=[^\0]{3,99}\0)(?=([a-z0-9_-]+)\.([a-z0-9_.]+)\0).{124}([0-7]{11})[\0 ].{12}"
    rb"([0-7]{6})\0 0.{100}ustar(?:\x0000.{80}\0.{166}|  \0.{247})"
)
"""As `_PLAIN`, or as GNU tar writes it: an index is made of what any tool has written."""
_USUAL = re.compile(_USUAL_HEADER, re.DOTALL)
_PAX_KIND = ord("x")
_KIND_AT = 156
_BLANK = ord(" ")
_BLANKS = 8 * _BLANK
"""What the checksum itself counts as in its sum."""


class TarError(UserError):
    """Bytes that are not a plain tar archive; the message gives the offset within it."""


class TarMember(NamedTuple):
    """One regular file of an archive: its name and where it lies, in bytes from the start.

    `start` is its first header block (a PAX header counts), `end` the byte after its padding.
    """

    name: str
    start: int
    data: int
    size: int
    end: int


def members(buffer: bytes | memoryview, *, whole: bool) -> Iterator[TarMember]:
    """The members of an archive, or of a run of whole members cut out of one (`whole=False`).

    Raises TarError at a damaged header, a member that runs past the end, anything but a regular
    file, a missing end-of-archive marker or bytes after it.
    """
    view = memoryview(buffer)
    offset = 0
    while not _is_end(view, offset, whole=whole):
        member = _plain_member(view, offset) or _read_member(view, offset)
        yield member
        offset = member.end


def named_members(
    buffer: bytes | memoryview, *, whole: bool
) -> Iterator[tuple[str, str, int, int, int, int]]:
    """Key, extension, start, data, size and end of what `members` gives, in fewer steps.

    The key and the extension are what is before and after the *first* dot of a name. Headers that
    most tools write are read here, with a PAX header before them that has a time (Python's tarfile,
    and so webdataset, writes it); all else by the general reader. Raises TarError as `members`.
    """
    view = memoryview(buffer)
    offset, size_of_all = 0, len(view)
    pax, behind = b"none yet", None
    while offset + BLOCK <= size_of_all:
        found, data = None, offset + BLOCK
        if view[offset + _KIND_AT] != _PAX_KIND:
            header = view[offset:data].tobytes()
            found = _USUAL.fullmatch(header)
        else:
            data += 2 * BLOCK
            blocks = view[offset:data].tobytes()
            # They differ in a length alone, and so hardly ever from one to the next.
            if not blocks.startswith(pax):
                pax = blocks[:BLOCK]
                behind = _behind_time(pax)
            if behind is not None:
                header = blocks[2 * BLOCK :]
                found = behind.fullmatch(blocks, BLOCK)
        if found is not None and header.isascii():
            key, extension, digits, checksum = found.groups()
            size = int(digits, 8)
            end = data + -(-size // BLOCK) * BLOCK
            if (
                adler32(header) & 0xFFFF == _half_of_adler32(checksum)
                and size <= MAX_MEMBER_BYTES
                and end <= size_of_all
            ):
                yield key.decode(), extension.decode(), offset, data, size, end
                offset = end
                continue
        if _is_end(view, offset, whole=whole):
            return
        member = _read_member(view, offset)
        name, _, rest = member.name.partition(".")
        yield name, rest, *member[1:]
        offset = member.end
    # Less than a block is left, if anything.
    if not _is_end(view, offset, whole=whole):
        _read_member(view, offset)


def _is_end(view: memoryview, offset: int, *, whole: bool) -> bool:
    """Whether no member follows. Raises TarError if the archive does not end as it should."""
    if offset >= len(view):
        if whole:
            raise TarError(
                f"it ends at byte {offset} without an end-of-archive marker: it was cut off there"
            )
        return True
    if view[offset] or view[offset : offset + BLOCK] != _ZERO_BLOCK:
        return False
    if not whole:
        raise TarError(f"expected a tar header at byte {offset}, found zeros")
    check_end(view, offset)
    return True


def _plain_member(view: memoryview, start: int) -> TarMember | None:
    """The member at `start` if `plain_header` takes its header; None of what is anything else."""
    data = start + BLOCK
    header = plain_header(bytes(view[start:data]))
    if header is None:
        return None
    key, extension, size = header
    end = data + -(-size // BLOCK) * BLOCK
    if end > len(view):
        return None
    return TarMember(f"{key.decode()}.{extension.decode()}", start, data, size, end)


def plain_header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Key, extension and size of what nearly all members are: the file `KEY.EXTENSION`, USTAR.

    None for all else and for whatever is wrong, of which `_read_member` judges: reading a clip
    without decoding it is little else than this.
    """
    found = _PLAIN.fullmatch(block)
    if found is None or not block.isascii():
        return None
    key, extension, digits, checksum = found.groups()
    if adler32(block) & 0xFFFF != _half_of_adler32(checksum):
        return None
    size = int(digits, 8)
    return None if size > MAX_MEMBER_BYTES else (key, extension, size)


@lru_cache(1 << 14)
def _half_of_adler32(checksum: bytes) -> int:
    """The lower half of Adler-32 of a header with this checksum, six octal digits.

    It is one more than the sum of the bytes: of so few below 128 it stays below the modulus. The
    checksum takes its own field for blanks, and two of its eight bytes are a zero and a blank.
    """
    return 1 + int(checksum, 8) - _BLANKS + sum(checksum) + _BLANK


@lru_cache(64)
def _behind_time(header: bytes) -> re.Pattern[bytes] | None:
    """What follows this PAX header if it is for a time alone: that, and the header of a plain file.

    None if it is anything else.
    """
    try:
        _, claimed, *_ = _header(memoryview(header), 0)
        size = _octal(claimed, "size", 0)
    except TarError:
        return None
    fixed = len("99 mtime=\n")
    if not fixed <= size <= 99:
        return None
    record = b"%d mtime=[0-9.]{%d}\n.{%d}" % (size, size - fixed, BLOCK - size)
    return re.compile(record + _USUAL_HEADER, re.DOTALL)


def _read_member(view: memoryview, start: int) -> TarMember:
    offset = start
    pax: dict[str, str] = {}
    while True:
        first, claimed, kind, magic, prefix = _header(view, offset)
        size = int(pax.get("size", "0")) if pax else 0
        size = size or _octal(claimed, "size", offset)
        if size > MAX_MEMBER_BYTES:
            raise TarError(
                f"the header at byte {offset} claims {size} bytes; {MAX_MEMBER_BYTES} are allowed"
            )
        data = offset + BLOCK
        end = data + -(-size // BLOCK) * BLOCK
        if end > len(view):
            raise TarError(
                f"the member at byte {offset} needs {end} bytes, but only {len(view)} are there: "
                "it was cut off"
            )
        if kind == b"x" and not pax:
            pax = _pax(view, data, size, offset)
            offset = end
            continue
        if kind not in (b"0", b"\0"):
            raise TarError(
                f"the member at byte {offset} is of tar type {kind!r}; only regular files are "
                "allowed (write with `tar --format=ustar`, files only)"
            )
        name = pax.get("path") or _name(first, magic, prefix, offset)
        return TarMember(name, start, data, size, end)


def next_member(read: Callable[[int], bytes], offset: int) -> bytes:
    """The headers, bytes and padding of the member that a stream goes on with; b"" at its end.

    `read` gives so many bytes, fewer where the stream ends; `offset` is where it is, for messages.

    Raises TarError as `members` does; nothing is set aside for a size above `MAX_MEMBER_BYTES`.
    """
    parts: list[bytes] = []
    while True:
        block = read(BLOCK)
        if block == _ZERO_BLOCK and not parts:
            if read(BLOCK) != _ZERO_BLOCK:
                raise TarError(f"its end-of-archive marker at byte {offset} is damaged")
            return b""
        if not block and not parts:
            raise TarError(
                f"it ends at byte {offset} without an end-of-archive marker: it was cut off there"
            )
        _, claimed, kind, _, _ = _header(memoryview(block), 0, offset + sum(map(len, parts)))
        size = _octal(claimed, "size", offset)
        if size > MAX_MEMBER_BYTES:
            raise TarError(
                f"the header at byte {offset} claims {size} bytes; {MAX_MEMBER_BYTES} are allowed"
            )
        is_pax = kind == b"x"
        if is_pax and (size > _MAX_PAX_BYTES or parts):
            raise TarError(f"the PAX header at byte {offset} has {size} bytes, or is a second one")
        padded = -(-size // BLOCK) * BLOCK
        payload = read(padded)
        if len(payload) < padded:
            raise TarError(
                f"the member at byte {offset} is cut off: {len(payload)} of {size} bytes"
            )
        parts += [block, payload]
        if not is_pax:
            return b"".join(parts)


def _header(
    view: memoryview, at: int, offset: int | None = None
) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """Name, size, type, magic and prefix of the header at `at`, byte `offset` of the archive."""
    offset = at if offset is None else offset
    if len(view) < at + BLOCK:
        raise TarError(f"it is cut off within the header at byte {offset}")
    name, size, checksum, kind, magic, prefix = _HEADER.unpack_from(view, at)
    claimed = _octal(checksum, "checksum", offset)
    actual = _sum(view[at : at + BLOCK], checksum)
    if claimed != actual:
        raise TarError(
            f"the header at byte {offset} is damaged: its checksum is {actual}, it says {claimed}"
        )
    if not magic.startswith(b"ustar"):
        raise TarError(f"the header at byte {offset} is not of the USTAR or PAX format")
    return name, size, kind, magic, prefix


def _sum(header: bytes | memoryview, checksum: bytes) -> int:
    """The checksum that a header should have; it has `checksum`."""
    # The lower half of Adler-32 is one more than the sum of at most 256 bytes: faster than `sum`.
    own = _BLANKS - 1 - (adler32(checksum) & 0xFFFF)
    halves = adler32(header[:256]) & 0xFFFF, adler32(header[256:]) & 0xFFFF
    return own + halves[0] + halves[1]


def _octal(text: bytes, what: str, offset: int) -> int:
    digits = text.rstrip(b"\0 ").lstrip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise TarError(f"there is no tar header at byte {offset}: its {what} is {text!r}")
    return int(digits, 8)


def _name(name: bytes, magic: bytes, prefix: bytes, offset: int) -> str:
    name = name.partition(b"\0")[0]
    # GNU tar writes "ustar  " and keeps times where USTAR has the prefix.
    if prefix[0] and magic.startswith(b"ustar\0"):
        name = prefix.partition(b"\0")[0] + b"/" + name
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise TarError(f"the member at byte {offset} has a name that is not UTF-8") from error


def _pax(view: memoryview, data: int, size: int, offset: int) -> dict[str, str]:
    if size > _MAX_PAX_BYTES:
        raise TarError(f"the PAX header at byte {offset} has {size} bytes")
    text = bytes(view[data : data + size])
    found: dict[str, str] = {}
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 6 else 0
        record = text[len(digits) + 1 : length]
        keyword, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(text):
            raise TarError(f"the PAX header at byte {offset} is damaged")
        try:
            found[keyword.decode()] = value[:-1].decode()
        except UnicodeDecodeError as error:
            raise TarError(f"the PAX header at byte {offset} is not UTF-8") from error
        text = text[length:]
    if not found.get("size", "0").isdigit() or len(found.get("size", "0")) > 18:
        raise TarError(f"the PAX header at byte {offset} has size {found['size']!r}")
    return found


def check_end(view: memoryview, offset: int) -> None:
    """Raises TarError unless `view` is, from `offset` on, an end-of-archive marker and zeros."""
    rest = view[offset:]
    if len(rest) < 2 * BLOCK:
        raise TarError(f"it is cut off within the end-of-archive marker at byte {offset}")
    for start in range(0, len(rest), 1 << 20):
        piece = bytes(rest[start : start + (1 << 20)])
        if piece.count(0) != len(piece):
            raise TarError(f"there are bytes after its end-of-archive marker at byte {offset}")
