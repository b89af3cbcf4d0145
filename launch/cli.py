"""The `kinodit` command: dispatch only, no logic.

A subcommand is a module `kinodit.launch.commands.NAME` with `HELP: str`,
`add_arguments(parser)` and `run(args) -> int`. It is imported when it is asked for, so that
`kinodit --help` answers before torch could have been loaded.

Exit codes: 0 done, 2 the user has something to change (one line on stderr, no traceback; of many
ranks one tells it), 80 to 84 a run was given up (`trainer/resilience/errors.py`), 130 interrupted,
141 the reader of a pipe went away; a command may return others of its own. torchrun ends with 1
whatever its ranks end with.
Anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import kinodit
from kinodit.launch.refusal import tell
from kinodit.models.errors import UserError
from kinodit.trainer.resilience.errors import CorruptedError

INTERRUPTED = 130
BROKEN_PIPE = 141

COMMANDS: dict[str, str] = {
    "train": "train or resume a run",
    "sample": "generate clips from a run",
    "evaluate": "losses, distances to the data and obedience of a run's samples",
    "measure": "measure which way sampled clips of the demo set move",
    "status": "show how a run stands, and what its time was spent on",
    "report": "write a run's HTML report",
    "certify": "prove that every layout trains like one process",
    "checkpoint": "list, describe, check and thin out checkpoints",
    "plan": "memory and speed of every layout on a cluster",
    "data": "pack, check, describe and preview shards",
    "config": "show, describe and compare recipes",
    "slurm": "render batch scripts, submit them, look after their jobs",
    "doctor": "check this machine, or the nodes of a job and what connects them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(arguments)
    args = parser.parse_args(arguments)
    try:
        with _full_disk_explained():
            code = int(args.run(args))
        sys.stdout.flush()
        return code
    except UserError as error:
        # Another start may get other devices; nothing else goes away by itself.
        tell(error, lasting=not isinstance(error, CorruptedError))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `kinodit ... | head`: what is still buffered has nobody to go to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


@contextmanager
def _full_disk_explained() -> Iterator[None]:
    """A full disk is the user's to mend, wherever it is met."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{error}: free some space, then give the same command") from error


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the one subcommand that `arguments` names."""
    parser = argparse.ArgumentParser(
        prog="kinodit", description="Train multi-modal diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"kinodit {kinodit.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name == asked:
            command = importlib.import_module(f"kinodit.launch.commands.{name}")
            subparser.description = command.HELP
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser
