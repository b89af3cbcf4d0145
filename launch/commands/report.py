"""`kinodit report RUN`: one HTML page about a run, finished or not."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Write RUN/report.html: losses, clips, speed, config and events of a run on one page that "
    "needs no network and no other file. The run may still be going on."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and where to write."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--output", type=Path, help="the page to write (default: RUN/report.html)")
    parser.add_argument(
        "--max-media-mib",
        type=float,
        default=64.0,
        metavar="MIB",
        help="clips of some steps are left out above this (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from kinodit.launch.report import write_report

    path = write_report(args.run_dir, args.output, max_media_mib=args.max_media_mib)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return 0
