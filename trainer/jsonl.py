"""Files of one JSON object per line: written whole, read back although a kill cut one short."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows to `path`; a reader sees each at once.

    Numbers that JSON lacks are written as the strings "NaN", "Infinity" and "-Infinity", which
    Python's `float` and JavaScript's `Number` read back. A file that exists is first rewritten
    with the rows that `keep` wants, and without a last line that a kill cut short.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        if path.is_file():
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                for row in read_rows(path):
                    if row is not None and (keep is None or keep(row)):
                        file.write(_line(row))
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of `path` in order; None for a line that is not a JSON object."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            yield row if isinstance(row, dict) else None


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
