"""`kinodit certify CONFIG`: does every layout train as one process does?"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinodit.trainer.certify.run import Row
    from kinodit.trainer.certify.twin import Twin

HELP = (
    "Train a small twin of the recipe's model in float64, on one process and under every layout, "
    "and compare losses, every gradient, parameters and averages. Needs no GPU and no data."
)
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, which layouts, and where the rows go."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument(
        "--layouts",
        default="all",
        help='"all" (every axis, every pair), or a list such as "cp=2;dp_shard=2,cp=2"',
    )
    parser.add_argument(
        "--world", type=int, default=4, help="processes at most, for --layouts all (default: 4)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")


def run(args: argparse.Namespace) -> int:
    """Print a table row by row; 1 if any layout differs."""
    from kinodit.trainer.certify.layouts import default_layouts, parse_layouts
    from kinodit.trainer.certify.run import certify
    from kinodit.trainer.certify.twin import twin
    from kinodit.trainer.config import load_config

    config = load_config(args.config, args.overrides)
    small = twin(config)
    if args.layouts == "all":
        layouts = default_layouts(small.config.model, config.parallel, args.world)
    else:
        layouts = parse_layouts(args.layouts, config.parallel)
    _print_twin(small)
    print(f"{'layout':<28} {'ranks':>5}  {'loss':>8} {'gradient':>8} {'weights':>8} {'average':>8}")
    start_s = time.monotonic()
    rows = []
    for row in certify(small, layouts):
        rows.append(row)
        _print_row(row)
    if args.json:
        args.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    num_ok = sum(row.ok for row in rows)
    print(
        f"{num_ok} of {len(rows)} layouts train as one process does, to 1e-12 in float64 "
        f"({time.monotonic() - start_s:.0f} s)"
    )
    return 0 if num_ok == len(rows) else FAILED


def _print_twin(small: Twin) -> None:
    changes = ", ".join(f"{key[6:]} {old} -> {new}" for key, old, new in small.shrunk)
    print(f"twin: {changes or 'the model is small enough as it is'}")
    print("data: 8 synthetic samples of odd lengths in 4 unequal packs a step, 3 steps")


def _print_row(row: Row) -> None:
    verdict = row.verdict
    errors = (
        ["-"] * 4
        if verdict is None
        else [
            f"{error:.0e}"
            for error in (
                verdict.loss_error,
                verdict.max_gradient_error,
                verdict.parameter_error,
                verdict.average_error,
            )
        ]
    )
    columns = " ".join(f"{error:>8}" for error in errors)
    print(f"{row.layout:<28} {row.num_ranks:>5}  {columns}  {'ok' if row.ok else 'DIFFERS'}")
    for fault in row.faults:
        print("    " + fault.rstrip().replace("\n", "\n    "))
