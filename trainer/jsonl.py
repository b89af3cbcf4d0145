"""Files of one JSON object per line: written whole, read back although a kill cut one short."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger("kinodit")

TAIL_BYTES = 1 << 16


class JsonLines:
    """Appends rows to `path`; a reader sees each at once.

    What a full disk refuses waits in memory, and is written with the first row that it takes; no
    row is written in part. Rows that still wait when the process ends are lost.

    Numbers that JSON lacks are written as the strings "NaN", "Infinity" and "-Infinity", which
    Python's `float` and JavaScript's `Number` read back. A file that exists first loses a last
    line that a kill cut short, and the rows that `keep` does not want.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        if path.is_file() and keep is not None:
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in read_rows(path) if row and keep(row))
            temporary.replace(path)
        self._path = path
        self._file = path.open("a+b", buffering=0)
        cut_torn_line(self._file)
        self._waiting: list[bytes] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, after those that wait."""
        refused = bool(self._waiting)
        self._waiting.append(_line(row).encode())
        if self._write(b"".join(self._waiting)):
            self._waiting.clear()
        elif not refused:
            _log.warning("disk full: what %s should say waits in memory", self._path)

    def close(self) -> None:
        """Close the file."""
        if self._waiting and not self._write(b"".join(self._waiting)):
            _log.warning("disk full: %d lines of %s are lost", len(self._waiting), self._path)
        self._file.close()

    def _write(self, data: bytes) -> bool:
        """All of it, or nothing."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        if written != len(data):
            self._file.truncate(size)
            return False
        return True


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of `path` in order; None for a line that is not a JSON object."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            yield row if isinstance(row, dict) else None


def cut_torn_line(file: IO[bytes]) -> None:
    """End `file` after its last newline, without a byte of space."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - TAIL_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            return
        end = start
    file.truncate(0)


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(_plain(row), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text + "\n"


def _plain(value: Any) -> Any:
    """`value` with non-finite numbers as strings and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
