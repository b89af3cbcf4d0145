"""`kinodit data plan` and `verify-ledger`: a recipe's data order, before a run and after it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from kinodit.launch.progress_line import ProgressLine

PROBLEMS_FOUND = 1


def add_order_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the actions to those of `kinodit data`."""
    _add_plan(actions)
    _add_verify_ledger(actions)


def _add_plan(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    action = actions.add_parser(
        "plan",
        help="what a recipe's data order will do: sizes, epochs, packs, balance, reads",
        description="Looks at the first steps of the plan; encoders' weights are not read, and of "
        "samples only the records of these steps, if the recipe takes reference pictures.",
    )
    action.add_argument("config", type=Path, help="a recipe, for example configs/t2v_tiny.yaml")
    action.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    action.add_argument(
        "--ranks", type=int, help="data-parallel ranks (default: data.packs_per_step)"
    )
    action.add_argument(
        "--steps", type=int, default=16, help="steps to look at (default: %(default)s)"
    )
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(act=_plan)


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


def _plan(args: argparse.Namespace) -> int:
    from kinodit.data.order_report import collect
    from kinodit.data.select import check_epochs
    from kinodit.launch.data_order import data_order, reference_counts
    from kinodit.launch.order_table import table
    from kinodit.models.errors import ConfigError
    from kinodit.trainer.config import load_config
    from kinodit.trainer.streams import not_exact, streamed

    config = load_config(args.config, args.overrides)
    ranks = config.data.packs_per_step if args.ranks is None else args.ranks
    if ranks < 1 or args.steps < 1:
        raise ConfigError(f"--ranks {ranks} and --steps {args.steps} must be at least 1")
    order = data_order(config)
    check_epochs(config.data, order.spec, config.run.steps)
    line = ProgressLine("steps")
    report = collect(
        order.spec, order.datasets, ranks, args.steps, lambda done, all_: line.show(done, all_, "")
    )
    line.end()
    report = replace(report, references=reference_counts(config, order, report.steps.num_steps))
    if args.json:
        document = asdict(report)
        del document["tokens"]
        document["steps"]["design_effect"] = report.steps.design_effect
        print(json.dumps({**document, "notes": order.notes}, indent=2))
    else:
        print(table(report, order.notes, config.run.steps))
        if said := not_exact(streamed(config)):
            print(said)
    return 0


def _verify_ledger(args: argparse.Namespace) -> int:
    from kinodit.launch.data_order import data_order
    from kinodit.trainer.config import CONFIG_FILE, load_config
    from kinodit.trainer.streams import not_exact
    from kinodit.trainer.verify_consumed import verify

    line = ProgressLine("steps")
    order = data_order(load_config(args.run_dir / CONFIG_FILE))
    verdict = verify(args.run_dir, order.spec, lambda done, all_: line.show(done, all_, ""))
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
    if verdict.streams:
        print(not_exact(list(verdict.streams)))
    return 0 if verdict.is_exact else PROBLEMS_FOUND
