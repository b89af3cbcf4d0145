"""`kinodit plan CONFIG --gpus N --gpu-memory GIB`: which layouts of a recipe fit a cluster?"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinodit.models.errors import ConfigError, UserError

if TYPE_CHECKING:
    from kinodit.data.reference_counts import ReferenceCounts
    from kinodit.launch.plan.estimate import Settings
    from kinodit.launch.plan.search import Found
    from kinodit.trainer.config import RunConfig
    from kinodit.trainer.engine.refusals import Wish

HELP = (
    "Estimate memory, communication and step time of every layout of a recipe on a cluster that "
    "need not exist, and list the fastest that fit. Opens no data, but to count the reference "
    "pictures of a recipe that takes some; needs no GPU."
)
NOTHING_FITS = 1
NUM_STEPS_READ = 16
"""Of the data order, whose records say how many reference pictures they have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, the cluster, what the recipe does not say, and where the rows go."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--gpus", type=int, required=True, help="how many in all")
    cluster.add_argument(
        "--gpu-memory", type=float, required=True, metavar="GIB", help="of each GPU"
    )
    cluster.add_argument("--gpu", default="H100", help="data sheet to use (default: H100)")
    cluster.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    cluster.add_argument(
        "--interconnect",
        default="ndr400",
        metavar="NAME|GB/S",
        help="between nodes: hdr200, ndr400, xdr800, ethernet100, or GB/s of a GPU (ndr400)",
    )
    cluster.add_argument(
        "--reserve",
        type=float,
        default=4.0,
        metavar="GIB",
        help="memory that CUDA, NCCL and fragments take (default: 4)",
    )
    work = parser.add_argument_group("what the recipe's encoders would say")
    work.add_argument(
        "--codec", metavar="TxHxWxC", help="frames, rows, columns of a latent cell; channels"
    )
    work.add_argument("--video-tokens", type=int, metavar="N", help="tokens of a clip")
    work.add_argument("--text-tokens", type=int, metavar="N", help="tokens of a caption")
    work.add_argument("--segments", type=int, metavar="N", help="samples of a pack")
    work.add_argument("--encoder-gib", type=float, metavar="GIB", help="memory of the encoders")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="layouts shown (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build one rank of the fastest layout without memory, and compare",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 if nothing fits, or if the dry run differs from it."""
    from kinodit.launch.plan import show
    from kinodit.launch.plan.search import search
    from kinodit.trainer.config import load_config

    if args.top < 1:
        raise ConfigError(f"--top {args.top}: must be at least 1")
    start_s = time.monotonic()
    config = load_config(args.config, args.overrides)
    if args.dry_run and config.engine.name != "native":
        raise ConfigError(
            f"--dry-run builds the native engine, and engine.name is {config.engine.name}: "
            "leave it out, or add engine.name=native"
        )
    settings = settings_of(args, config)
    found = search(settings, config.parallel, config.remat)
    print(show.plan(settings, found, args.top))
    print(f"planned in {time.monotonic() - start_s:.1f} s")
    document: dict[str, Any] = show.document(settings, found, args.top)
    code = 0 if found.fitting else NOTHING_FITS
    if args.dry_run:
        code = max(code, _dry_run(settings, found, config, document))
    if args.json:
        try:
            args.json.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error
    return code


def settings_of(args: argparse.Namespace, config: RunConfig) -> Settings:
    """What the arguments and the recipe say of the step, the model and the cluster."""
    from kinodit.launch.plan.estimate import Settings
    from kinodit.launch.plan.hardware import build_cluster
    from kinodit.launch.plan.state import Weights
    from kinodit.launch.plan.workload import Given, read_workload
    from kinodit.trainer.parallel.volume import Formats

    counts = _reference_counts(config)
    given = Given(
        codec=_codec(args.codec),
        video_tokens=args.video_tokens,
        text_tokens=args.text_tokens,
        segments=args.segments,
        encoder_gib=args.encoder_gib,
        pictures=None if counts is None else counts.most,
    )
    precision = config.precision
    workload = read_workload(config, given)
    if counts is not None:
        workload = workload.noting(
            f"of the {counts.num_samples} samples of the first {counts.num_steps} steps "
            f"{counts.with_some} bring reference pictures along, of which {counts.pictures} take "
            f"part; every pack is taken with {counts.most}, as the one that has most"
        )
    if args.gpus == 1 and precision.compute_dtype.itemsize < precision.params_dtype.itemsize:
        workload = workload.noting(
            "one process computes under autocast, which widens some tensors: activations are "
            "counted as if it widened all, the most that it can be"
        )
    return Settings(
        workload=workload,
        weights=Weights(workload.model, config.optim),
        formats=Formats(
            precision.params_dtype.itemsize,
            precision.compute_dtype.itemsize,
            precision.reduce_dtype.itemsize,
        ),
        cluster=build_cluster(
            args.gpu,
            args.gpus,
            args.gpu_memory,
            args.interconnect,
            args.gpus_per_node,
            args.reserve,
        ),
        num_averages=len(config.ema),
        micro_batches=config.engine.micro_batches,
        wish=_wish(config),
    )


def _reference_counts(config: RunConfig) -> ReferenceCounts | None:
    """What the data has of reference pictures, if it is on this machine; records alone say so."""
    from kinodit.data.manifest import MANIFEST_FILE
    from kinodit.launch.data_order import data_order, reference_counts

    data = config.data
    folders = [Path(entry.path) for entry in data.datasets.values()]
    is_here = all((folder / MANIFEST_FILE).is_file() for folder in folders)
    if not data.max_references or not folders or not is_here:
        return None
    return reference_counts(config, data_order(config), NUM_STEPS_READ)


def _wish(config: RunConfig) -> Wish | None:
    """What the engine is asked for, but for kernels that this machine need not have."""
    from kinodit.trainer.engine.refusals import Wish

    if config.engine.name == "native":
        return None
    precision = replace(config.precision, float8="none")
    return Wish(
        config.engine, config.optim, config.parallel, precision, config.remat, elsewhere=True
    )


def _codec(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--codec {text}: four numbers are needed, for instance 4x8x8x16")
    frames, rows, columns, channels = map(int, parts)
    return frames, rows, columns, channels


def _dry_run(settings: Settings, found: Found, config: RunConfig, document: dict[str, Any]) -> int:
    from kinodit.launch.plan import show
    from kinodit.launch.plan.dryrun import dry_run

    if not found.fitting:
        print("dry run: there is no layout to try")
        return NOTHING_FITS
    result = dry_run(settings, found.fitting[0], config)
    print(show.dry_run(result))
    document["dry_run"] = result.to_json()
    return 0 if result.ok else NOTHING_FITS
