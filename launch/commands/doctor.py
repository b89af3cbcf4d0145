"""`kinodit doctor`: check this machine, or the nodes of a job and what connects them."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

HELP = (
    "Check versions, devices, disk, permissions and limits of this machine; under srun or torchrun "
    "also that all ranks come, that clocks agree, and that collectives are right and fast."
)
UNFIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run will write, and how the batch script learns of it."""
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where runs write (default: %(default)s)"
    )
    parser.add_argument(
        "--deadline", type=float, default=300.0, help="seconds at most (default: %(default)s)"
    )
    parser.add_argument(
        "--passed", type=Path, metavar="DIR", help="leave a file here, named for each fit node"
    )


def run(args: argparse.Namespace) -> int:
    """Check, and print a table on rank 0; 1 if anything failed."""
    # By the system: a rank that hangs in a driver or a library would not come back to Python.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, args.deadline)
    from kinodit.launch.doctor.examine import examine
    from kinodit.launch.doctor.report import Verdict, table
    from kinodit.launch.topology import read_topology

    topology = read_topology()
    reports = examine(topology, args.folder, args.passed, args.deadline / 3)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if topology.is_main or len(reports) == 1:
        print(table(reports), file=sys.stdout, flush=True)
    return UNFIT if any(report.verdict is Verdict.FAIL for report in reports) else 0
