"""`kinodit certify CONFIG`: does every layout train as one process does?"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kinodit.launch.progress_line import ProgressLine

if TYPE_CHECKING:
    from kinodit.trainer.certify.run import Case, Row
    from kinodit.trainer.certify.twin import Twin
    from kinodit.trainer.config import RunConfig
    from kinodit.trainer.parallel.mesh import ParallelConfig

HELP = (
    "Train a small twin of the recipe's model on one process and under every layout, in float64 "
    "and in bfloat16, and compare losses, every gradient, parameters and averages. Needs no GPU "
    "and no data."
)
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, which layouts, and where the rows go."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument(
        "--layouts",
        default="all",
        help='"all" (see --size), or a list such as "cp=2;dp_shard=2,cp=2"',
    )
    parser.add_argument(
        "--size",
        choices=("default", "full"),
        default="default",
        help="what all is: every axis and pair (minutes), or every triple of axes, too",
    )
    parser.add_argument(
        "--world",
        type=int,
        help="processes at most, for --layouts all (default: 4; 8 for --size full)",
    )
    parser.add_argument(
        "--engines",
        default="own",
        help='"own" (the recipe\'s), "all" that are installed, or a list such as "native,zero3" '
        "(default: own)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: a device per rank, in bfloat16 alone (default: cpu)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="every layout with compiled blocks, too, in float64: minutes for each the first time",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="where to keep the certificate (default: in the run's folder, where train looks)",
    )


def run(args: argparse.Namespace) -> int:
    """Print a table row by row; 1 if any layout differs."""
    from kinodit.trainer.certify.certificate import FILE, Certificate
    from kinodit.trainer.certify.layouts import layout_name, num_ranks
    from kinodit.trainer.certify.run import certify
    from kinodit.trainer.certify.twin import twin
    from kinodit.trainer.config import load_config
    from kinodit.trainer.streams import not_exact, streamed

    config = load_config(args.config, args.overrides)
    small = twin(config)
    layouts = chosen_layouts(args, small)
    _check_devices(args.device, max(map(num_ranks, layouts)))
    cases = cases_of(args, layouts, small.config)
    _print_twin(small)
    width = max(len(_shown_name(layout_name(case.layout), case)) for case in cases)
    print(
        f"{'layout':<{width}} {'dtype':<9} {'loss':>7} {'gradient':>8} {'weights':>8} {'noise':>6}"
    )
    start_s = time.monotonic()
    rows = []
    line = ProgressLine("layouts")
    line.show(0, len(cases), "")
    for row in certify(small, cases, args.device):
        rows.append(row)
        line.end()
        _print_row(row, width)
        line.show(len(rows), len(cases), "")
    line.end()
    if args.json:
        _write(args.json, [row.to_json() for row in rows])
    num_ok = sum(row.ok for row in rows)
    print(
        f"{num_ok} of {len(rows)} agree with one process: float64 to 1e-12, bfloat16 within "
        f"4 times what rounding does ({time.monotonic() - start_s:.0f} s)"
    )
    path = args.certificate or config.run.folder / FILE
    Certificate.of(small, rows).save(path)
    print(f"certificate: {path}")
    if said := not_exact(streamed(config)):
        print(f"{said}. The certificate is of the model, not of the order of this data")
    return 0 if num_ok == len(rows) else FAILED


def chosen_layouts(args: argparse.Namespace, small: Twin) -> list[ParallelConfig]:
    """The layouts that a command line asks for."""
    from kinodit.models.errors import ConfigError
    from kinodit.trainer.certify.layouts import default_layouts, full_layouts, parse_layouts

    base = small.config.parallel
    if args.layouts != "all":
        return parse_layouts(args.layouts, base)
    choose, world = (full_layouts, 8) if args.size == "full" else (default_layouts, 4)
    layouts = choose(small.config.model, base, args.world or world)
    if not layouts:
        raise ConfigError(
            f"--world {args.world}: the smallest layout that could differ has 2 processes"
        )
    return layouts


def cases_of(
    args: argparse.Namespace, layouts: Sequence[ParallelConfig], config: RunConfig
) -> list[Case]:
    """A case for each layout, format and engine; in a grid, every axis with its packs merged.

    What an engine refuses is left out.

    Raises:
        ConfigError: nothing is left.
    """
    from kinodit.models.errors import ConfigError
    from kinodit.trainer.certify.engines import can_have, chosen_engines
    from kinodit.trainer.certify.layouts import lowest, num_ranks
    from kinodit.trainer.certify.run import Case, Variant

    dtypes = ("float64", "bfloat16") if args.device == "cpu" else ("bfloat16",)
    engines = chosen_engines(args.engines, config.engine)
    found = [
        Case(layout, dtype, engine)
        for dtype in dtypes
        for layout in (lowest(layouts) if _is_short(args, dtype) else layouts)
        for engine in engines
    ]
    alone = [layout for layout in layouts if num_ranks(layout) == 2]
    chosen: list[tuple[ParallelConfig, Variant]] = []
    if args.layouts == "all":
        chosen += [(layout, "merged") for layout in alone]
    if args.compile:
        chosen += [(layout, "compiled") for layout in layouts]
    found += [
        Case(layout, dtypes[0], engine, variant) for layout, variant in chosen for engine in engines
    ]
    left = [case for case in found if can_have(case.engine_config, case.layout, config)]
    if not left:
        raise ConfigError(f"--engines {args.engines}: none of them has any of these layouts")
    return left


def _is_short(args: argparse.Namespace, dtype: str) -> bool:
    """Whether degrees of 4 are left out: in the default grid, beside their proof in float64."""
    grid: bool = args.layouts == "all" and args.size == "default"
    return grid and dtype == "bfloat16" and args.device == "cpu"


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    from kinodit.models.errors import UserError

    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _print_twin(small: Twin) -> None:
    changes = ", ".join(
        f"{key.removeprefix('model.')} {old} -> {new}" for key, old, new in small.shrunk
    )
    print(f"twin: {changes or 'the model is small enough as it is'}")
    print(
        "data: 8 synthetic samples of odd lengths in 4 unequal packs a step, "
        f"{small.num_steps} steps"
    )


def _shown_name(layout: str, one: Case | Row) -> str:
    engine = "" if one.engine == "native" else one.engine
    return " ".join(filter(None, (layout, engine, one.variant)))


def _print_row(row: Row, width: int) -> None:
    known = row.verdict
    errors = ["-"] * 3
    if known is not None:
        values = (known.loss_error, known.max_gradient_error, known.parameter_error)
        errors = [f"{error:.0e}" for error in values]
    noise = "" if known is None or known.noise_ratio is None else f"{known.noise_ratio:.1f}x"
    print(
        f"{_shown_name(row.layout, row):<{width}} {row.dtype:<9} "
        f"{errors[0]:>7} {errors[1]:>8} {errors[2]:>8} "
        f"{noise:>6}  {'ok' if row.ok else 'DIFFERS'}"
    )
    for fault in row.faults:
        print("    " + fault.rstrip().replace("\n", "\n    "))
    if row.where:
        print(f"    first difference: {row.where}")
    if row.cause:
        print(f"    likely cause: {row.cause}")


def _check_devices(device: str, needed: int) -> None:
    import torch

    from kinodit.models.errors import ConfigError

    found = torch.cuda.device_count() if device == "cuda" else needed
    if found < needed:
        raise ConfigError(
            f"--device cuda: the layouts need {needed} devices, and there are {found}: name "
            "smaller ones by --layouts or --world, or use --device cpu"
        )
