"""`kinodit train CONFIG [key=value ...]`: train, or go on where the run's folder stands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kinodit.trainer.resilience.lock import keep_to_group
from kinodit.trainer.resilience.signals import Signals
from kinodit.trainer.resilience.watchdog import supervise

HELP = (
    "Train the recipe CONFIG. The same command resumes: a run continues from the last checkpoint "
    "in its folder. One process, torchrun and srun take the same arguments."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    parser.add_argument("config", type=Path, help="a recipe, for example configs/t2v_tiny.yaml")
    parser.add_argument(
        "--ledger",
        action="store_true",
        help="keep which samples each step was trained on (log.ledger=true), for "
        "`kinodit data verify-ledger`",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")


def run(args: argparse.Namespace) -> int:
    """Train to the recipe's last step, or until asked to stop: both are a success."""
    keep_to_group()
    # Handlers first: what follows takes seconds, in which a signal would end the process.
    with Signals() as signals:
        is_alone = "torch" not in sys.modules
        code = supervise()
        if code is not None:
            return code
        from kinodit.data import fork_server
        from kinodit.launch.topology import process_group, read_topology
        from kinodit.trainer.config import load_config
        from kinodit.trainer.run import train

        ledger = ["log.ledger=true"] if args.ledger else []
        config = load_config(args.config, [*args.overrides, *ledger])
        is_given = config.sample.given or config.sample.references
        if is_alone and (config.data.workers == "processes" or is_given):
            # While there are neither threads nor connections, and no weights in memory.
            fork_server.fork_early()
        topology = read_topology()
        with process_group(topology, config.run.deadline_s) as device:
            train(config, topology, device, sys.stderr, signals)
    return 0
