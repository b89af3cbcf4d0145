"""`kinodit data plan` and `verify-ledger`: a recipe's data order, before a run and after it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from kinodit.launch.progress_line import ProgressLine

PROBLEMS_FOUND = 1


def add_order_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the actions to those of `kinodit data`."""
    _add_verify_ledger(actions)


def _add_verify_ledger(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    action = actions.add_parser(
        "verify-ledger",
        help="prove that a run, with its restarts, lost no sample and took none twice; 1 if not",
        description="Compares what a run trained with --ledger has consumed with its plan, place "
        "by place. The datasets must be where the run's recipe says.",
    )
    action.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(act=_verify_ledger)


def _verify_ledger(args: argparse.Namespace) -> int:
    from kinodit.launch.data_order import data_order
    from kinodit.trainer.config import CONFIG_FILE, load_config
    from kinodit.trainer.verify_consumed import verify

    line = ProgressLine()
    order = data_order(load_config(args.run_dir / CONFIG_FILE))
    verdict = verify(args.run_dir, order.spec, lambda done, all_: line.show(done, all_, "steps"))
    line.end()
    if args.json:
        print(json.dumps({**asdict(verdict), "is_exact": verdict.is_exact}, indent=2))
        return 0 if verdict.is_exact else PROBLEMS_FOUND
    print(
        f"{args.run_dir}: {verdict.num_steps} steps in {verdict.num_lives} lives, "
        f"{verdict.num_samples} samples: {verdict.lost} lost, {verdict.duplicated} duplicated, "
        f"{verdict.unplanned} unplanned"
    )
    for count, text in (
        (verdict.substituted, "places of damaged samples taken by substitutes"),
        (verdict.redone, "rows undone by a restart and done again"),
        (verdict.passed_over, "steps of the plan passed over after going back"),
    ):
        if count:
            print(f"  {count} {text}")
    for fault in verdict.faults:
        print(f"  {fault}")
    return 0 if verdict.is_exact else PROBLEMS_FOUND
