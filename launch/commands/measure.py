"""`kinodit measure RUN`: sample the demo set's prompts and measure which way the clips move."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from kinodit.launch.progress_line import StageLines
from kinodit.launch.topology import process_group, read_topology

HELP = (
    "Sample clips of the stamp theatre and compare the direction that each prompt names with the "
    "direction that its clip shows (chance: 25 %). Under torchrun the clips are shared out."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and how many clips."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--clips", type=int, default=64, help="clips to sample (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the recipe's)")


def run(args: argparse.Namespace) -> int:
    """Sample, measure, print a table."""
    from kinodit.data.reader import ShardReader
    from kinodit.data.select import open_datasets
    from kinodit.trainer.motion import measure_gallery, motion_prompts
    from kinodit.trainer.sampling import load_run, sample_run

    config = load_run(args.run_dir)
    topology = read_topology()
    lines = StageLines("done", is_shown=topology.is_main)
    metas = []
    for name, dataset in open_datasets(config.data).items():
        with closing(ShardReader(dataset)) as reader:
            for index in range(len(dataset)):
                metas.append(reader.read(index).meta)
                lines.show(f"reading captions of {name}", index + 1, len(dataset))
    prompts = motion_prompts(metas, args.clips, args.seed)
    folder = args.run_dir / "samples" / "motion"
    settings = replace(config.sample, seed=args.seed)
    if args.guidance is not None:
        settings = replace(settings, guidance=replace(settings.guidance, scale=args.guidance))
    with process_group(topology, config.run.deadline_s) as device:
        sample_run(
            args.run_dir, config, settings, prompts, folder, None, topology, device,
            partial(lines.show, "drawing"),
        )  # fmt: skip
    lines.end()
    if not topology.is_main:
        return 0
    result = measure_gallery(folder)
    result.save(args.run_dir)
    print(
        f"{result.num_right} of {result.num_clips} clips move as their prompt says: "
        f"{result.accuracy:.0%} (chance 25 %)"
    )
    print("named \\ shown  " + "  ".join(f"{name:>5}" for name in result.confusion))
    for named, shown in result.confusion.items():
        print(f"{named:>13}  " + "  ".join(f"{count:5d}" for count in shown.values()))
    sys.stdout.flush()
    return 0
