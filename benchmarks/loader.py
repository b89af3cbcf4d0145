"""What the data plane costs and wastes, beside what is in use elsewhere.

    python benchmarks/loader.py [--json FILE] [--only FAMILY ...]

Each family of rows is a module of its own that has `rows()`, and tells there what is measured.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from goals import Row, show

FAMILIES = {
    "balance": "loader_balance",
    "indexing": "loader_indexing",
    "reading": "loader_reading",
    "remote": "loader_remote",
}
"""Name of a family -> its module beside this file."""


def rows(families: Sequence[str]) -> Iterator[Row]:
    """The rows of `families`, one family after the other."""
    for name in families:
        yield from importlib.import_module(FAMILIES[name]).rows()


def main() -> None:
    """Print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description="the data plane")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args()
    show(rows(args.only), "beside it", args.json)


if __name__ == "__main__":
    main()
