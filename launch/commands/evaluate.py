"""`kinodit evaluate RUN`: what a checkpoint is worth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kinodit.launch.progress_line import StageLines
from kinodit.launch.topology import process_group, read_topology

HELP = (
    "Measure a checkpoint: validation loss by stream, task and noise level; clips generated for "
    "the validation set's captions and their distance to it (FID, KID, FVD, FAD, CLIP score); what "
    "clips of the demo set show and when they sound. Under torchrun the work is shared out; the "
    "figures are the same."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, how much of what, and which checkpoint."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="clips (default: eval.num_samples)"
    )
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the last)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="draw these tasks of the recipe, too, from what the validation set gives them; all: "
        "every task",
    )
    parser.add_argument("--losses-only", action="store_true", help="draw no clips from captions")


def run(args: argparse.Namespace) -> int:
    """Evaluate; prints a table."""
    from kinodit.trainer.evaluation.run import EvaluationConfig, evaluate_run
    from kinodit.trainer.evaluation.table import summary
    from kinodit.trainer.sampling import load_run

    tasks = tuple(args.tasks)
    wanted = EvaluationConfig(args.samples, args.step, not args.losses_only, tasks)
    config = load_run(args.run_dir)
    topology = read_topology()
    lines = StageLines("done", is_shown=topology.is_main)
    with process_group(topology, config.run.deadline_s) as device:
        figures = evaluate_run(args.run_dir, config, wanted, topology, device, lines.show)
    lines.end()
    if topology.is_main:
        rows = summary(figures)
        width = max(len(label) for label, _ in rows)
        print(f"step {figures['step']} of {args.run_dir}")
        for label, value in rows:
            print(f"{label:<{width}}  {value}")
    sys.stdout.flush()
    return 0
