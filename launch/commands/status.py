"""`kinodit status RUN`: how a run stands, in a few lines."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HELP = (
    "Show how far a run is, what its time was spent on (goodput), and what happened last. The run "
    "may be going on; nothing is written."
)
NUM_EVENTS = 5
MAX_MESSAGE = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, and how to print."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the status."""
    from kinodit.launch.report.account import PARTS, counts, percent
    from kinodit.launch.report.read import read_run, run_state
    from kinodit.trainer.checkpoint import find_checkpoints, step_of
    from kinodit.trainer.progress import bar, duration
    from kinodit.trainer.resilience.goodput import Goodput, read_goodput
    from kinodit.trainer.resilience.lock import describe_lock

    found = read_run(args.run_dir)
    state = run_state(found, time.time())
    goodput = read_goodput(args.run_dir) or Goodput()
    checkpoints = [step_of(path) for path in find_checkpoints(args.run_dir)]
    if args.json:
        document: dict[str, Any] = {
            "name": found.name,
            "state": state.label,
            "step": found.last_step,
            "total_steps": found.total_steps,
            "checkpoints": checkpoints,
            "goodput": None if goodput.wall_s <= 0 else goodput.share,
            "seconds": asdict(goodput),
            "lock": describe_lock(args.run_dir),
        }
        print(json.dumps(document))
        return 0
    share = found.last_step / found.total_steps if found.total_steps else 0.0
    print(f"{found.name}: {state.label}, {state.detail}")
    print(f"steps       {found.last_step:,} of {found.total_steps:,}  {bar(share, 24)} {share:.0%}")
    if checkpoints:
        print(f"checkpoint  step {checkpoints[-1]:,} ({len(checkpoints)} kept)")
    owner = describe_lock(args.run_dir)
    if owner:
        print(f"in use by   {owner}")
    if goodput.wall_s > 0:
        without = percent(goodput.share_without_startup)
        print(
            f"goodput     {percent(goodput.share)} of {duration(goodput.wall_s)} "
            f"({without} without start-up)"
        )
        seconds = asdict(goodput)
        for key, (label, hint) in PARTS.items():
            if seconds[key] > 0:
                part = percent(seconds[key] / goodput.wall_s)
                print(f"  {label:<11}{part:>7}  {duration(seconds[key]):>8}  {hint}")
        happened = ", ".join(f"{label} {count}" for label, count in counts(found, goodput))
        print(f"so far      {happened}")
    for event in found.events[-NUM_EVENTS:]:
        message = str(event["message"])
        shown = message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 1]}…"
        print(f"  step {event['step']:>7,}  {event['event']:<11} {shown}")
    return 0
