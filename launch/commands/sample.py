"""`kinodit sample RUN --prompt TEXT ...`: clips from a run's last checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kinodit.launch.progress_line import StageLines
from kinodit.launch.topology import process_group, read_topology
from kinodit.models.errors import UserError

if TYPE_CHECKING:
    from kinodit.data.config import DataConfig
    from kinodit.trainer.generate import SampleConfig

HELP = (
    "Write a clip (mp4, or PNG for one frame) for each prompt and a contact sheet. Under torchrun "
    "the prompts are shared out over the ranks; the clips are the same."
)


class SampleError(UserError):
    """The request leaves nothing to sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, prompts and what differs from the recipe's sampling."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, help="a text file with one prompt per line")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN/samples/manual)")
    parser.add_argument("--seed", type=int, help="of the initial noise")
    parser.add_argument("--steps", type=int, help="steps of the time grid")
    parser.add_argument("--method", choices=("euler", "heun", "dpmpp_2m"), help="integrator")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    parser.add_argument(
        "--negative",
        metavar="TEXT",
        help="guide away from this caption instead of the empty one ('' for the empty one)",
    )
    parser.add_argument("--rescale", type=float, help="share of guidance rescaling, 0 to 1")
    parser.add_argument(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels at which guidance acts",
    )
    parser.add_argument(
        "--guide",
        action="append",
        default=[],
        metavar="STREAM=SCALE",
        help="guidance scale of what a stream tells the others, given or generated (repeatable)",
    )
    parser.add_argument("--task", help="one of the recipe's tasks (default: all from the prompt)")
    parser.add_argument(
        "--given", metavar="FILE", help="a picture, clip or sound that has what the task is given"
    )
    parser.add_argument(
        "--box",
        type=float,
        nargs=4,
        metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"),
        help="where the box of the task is, in parts of a frame (default: drawn by --seed)",
    )
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--frames", type=int, metavar="N", help="how many frames the task is given (default: drawn)"
    )
    frames.add_argument(
        "--at", type=int, nargs="+", metavar="N", help="which frames: 0 is the first, -1 the last"
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture that the task is given before the clip (repeatable, in their order)",
    )
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LENGTH_S", "OVERLAP_S"),
        help="draw a longer clip in windows; 'A | B' are prompts that follow each other",
    )
    parser.add_argument("--ema", help="name of the average to use; '' for the plain parameters")
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the last)")
    parser.add_argument(
        "--num-frames", type=int, metavar="N", help="1 is a picture (default: as in training)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels; likewise"
    )


def run(args: argparse.Namespace) -> int:
    """Sample; prints where the clips are."""
    is_alone = "torch" not in sys.modules
    from kinodit.data import fork_server
    from kinodit.trainer.sampling import load_run, sample_run

    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            prompts += [line.strip() for line in args.prompts.read_text().splitlines()]
        except OSError as error:
            raise SampleError(f"cannot read {args.prompts}: {error.strerror}") from error
    prompts = [prompt for prompt in prompts if prompt]
    config = load_run(args.run_dir)
    prompts = prompts or list(config.sample.prompts)
    if not prompts:
        raise SampleError("no prompt: give --prompt TEXT or --prompts FILE")
    folder = args.out or args.run_dir / "samples" / "manual"
    config = replace(config, data=shape_of(args, config.data))
    settings = settings_of(args, config.sample)
    if is_alone and (settings.given or settings.references):
        # While there are neither threads nor connections, and no weights in memory.
        fork_server.fork_early()
    topology = read_topology()
    lines = StageLines("steps", is_shown=topology.is_main)
    with process_group(topology, config.run.deadline_s) as device:
        entries = sample_run(
            args.run_dir, config, settings, prompts, folder, args.step, topology, device,
            partial(lines.show, f"drawing {len(prompts)} clip(s)"),
        )  # fmt: skip
    lines.end()
    if topology.is_main:
        print(f"{len(entries)} clip(s) in {folder}, side by side in {folder / 'sheet.png'}")
    sys.stdout.flush()
    return 0


def shape_of(args: argparse.Namespace, trained: DataConfig) -> DataConfig:
    """The clips that training had, with the length and size that the command line gives instead."""
    height, width = args.size or (trained.height, trained.width)
    num_frames = trained.num_frames if args.num_frames is None else args.num_frames
    return replace(trained, num_frames=num_frames, height=height, width=width)


def settings_of(args: argparse.Namespace, defaults: SampleConfig) -> SampleConfig:
    """The recipe's sampling with what the command line gives instead."""
    from kinodit.models.diffusion.windows import WindowConfig

    sampler, guidance = defaults.sampler, defaults.guidance
    if args.steps is not None:
        sampler = replace(sampler, steps=args.steps)
    if args.method is not None:
        sampler = replace(sampler, method=args.method)
    if args.guidance is not None:
        guidance = replace(guidance, scale=args.guidance)
    if args.rescale is not None:
        guidance = replace(guidance, rescale=args.rescale)
    if args.interval is not None:
        guidance = replace(guidance, interval=tuple(args.interval))
    if args.guide:
        guidance = replace(guidance, conditions={**guidance.conditions, **_scales(args.guide)})
    region = defaults.region
    if args.box is not None:
        region = replace(region, box=tuple(args.box))
    if args.frames is not None or args.at is not None:
        region = replace(region, frames=args.frames or 0, at=tuple(args.at or ()))
    window = defaults.window if args.window is None else WindowConfig(*args.window)
    return replace(
        defaults,
        task=defaults.task if args.task is None else args.task,
        given=defaults.given if args.given is None else args.given,
        references=tuple(args.reference) or defaults.references,
        window=window,
        region=region,
        negative=defaults.negative if args.negative is None else args.negative,
        seed=defaults.seed if args.seed is None else args.seed,
        ema=defaults.ema if args.ema is None else args.ema,
        sampler=sampler,
        guidance=guidance,
    )


def _scales(given: Sequence[str]) -> dict[str, float]:
    """STREAM=SCALE of each."""
    scales = {}
    for item in given:
        stream, _, scale = item.partition("=")
        try:
            scales[stream] = float(scale)
        except ValueError as error:
            raise SampleError(f"--guide {item}: STREAM=SCALE is needed, as video=2.0") from error
    return scales
