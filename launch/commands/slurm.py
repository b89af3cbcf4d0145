"""`kinodit slurm`: batch scripts for Slurm."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kinodit.models.errors import UserError

HELP = "Render the batch script that trains a recipe on a Slurm cluster."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per verb."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    render = verbs.add_parser("render", help="print a batch script, or write it to --out")
    render.add_argument("config", type=Path, help="a recipe, for example configs/t2v_tiny.yaml")
    render.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    render.add_argument(
        "--cluster", default="generic", help="a name in slurm/clusters, or a YAML file's path"
    )
    render.add_argument("--nodes", type=int, default=1, help="number of nodes (default: 1)")
    render.add_argument("--out", type=Path, help="write the script here, executable")


def run(args: argparse.Namespace) -> int:
    """Render, and print or write."""
    from kinodit.launch.slurm import render

    script = render(args.config, args.overrides, args.cluster, args.nodes, args.out)
    if args.out is None:
        print(script, end="")
        return 0
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(script)
        args.out.chmod(0o755)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from error
    print(f"wrote {args.out}; submit it with: sbatch {args.out}", file=sys.stderr)
    return 0
