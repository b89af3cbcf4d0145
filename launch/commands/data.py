"""`kinodit data`: make, index, check, describe and preview datasets."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from kinodit.launch.index_actions import add_index_actions
from kinodit.launch.order_actions import PROBLEMS_FOUND, add_order_actions
from kinodit.launch.progress_line import ProgressLine

HELP = "Make, index, check, describe and preview datasets (shards with an index and a manifest)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_pack(actions)
    _add_demo(actions)
    add_index_actions(actions)
    action = actions.add_parser("validate", help="check every byte of a dataset; 1 if it is bad")
    action.add_argument("directory", type=Path, metavar="DIR")
    action.add_argument("--decode", action="store_true", help="open every medium as well")
    action.add_argument(
        "--part", default="0/1", metavar="I/N", help="check every N-th shard from the I-th on only"
    )
    action.add_argument("--report", type=Path, metavar="FILE", help="keep what was found as JSON")
    action.add_argument(
        "--reports", type=Path, metavar="DIR", help="check nothing; judge the reports of all parts"
    )
    action.set_defaults(act=_validate)
    _add_encode(actions)
    _add_curate(actions)
    action = actions.add_parser("stats", help="what is in a dataset, from its index alone")
    action.add_argument("directory", type=Path, metavar="DIR")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(act=_stats)
    action = actions.add_parser("preview", help="one offline HTML contact sheet of a dataset")
    action.add_argument("directory", type=Path, metavar="DIR")
    action.add_argument(
        "--out", type=Path, help="the page to write (default: DIR with .preview.html)"
    )
    action.add_argument("--num-samples", type=int, default=60, help="default: %(default)s")
    action.add_argument("--seed", type=int, default=0, help="draws the samples")
    action.set_defaults(act=_preview)
    add_order_actions(actions)


def run(args: argparse.Namespace) -> int:
    """Runs the action that was asked for; its exit code."""
    return int(args.act(args))


def _add_pack(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    action = actions.add_parser(
        "pack",
        help="pack a folder or table of media and captions into shards",
        description="SRC: a folder of media with sidecar NAME.txt or NAME.json captions, or a "
        "CSV, TSV or JSONL table with columns path and caption.",
    )
    action.add_argument("source", type=Path, metavar="SRC")
    action.add_argument("destination", type=Path, metavar="DST")
    action.add_argument("--name", default="", help="name of the dataset (default: that of DST)")
    action.add_argument(
        "--shard-mb", type=int, default=256, help="size of a shard in MiB (default: %(default)s)"
    )
    action.add_argument(
        "--skip-bad", action="store_true", help="leave out media that cannot be packed"
    )
    action.add_argument(
        "--allow-uncaptioned", action="store_true", help="pack media that have no caption, too"
    )
    action.set_defaults(act=_pack)


def _add_encode(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    action = actions.add_parser(
        "encode",
        help="encode a recipe's dataset once: latents and text features as shards",
        description="RECIPE is read with its overrides (key=value). What was done before is kept, "
        "so that the same command goes on where it was interrupted.",
    )
    action.add_argument("recipe", type=Path, metavar="RECIPE")
    action.add_argument("destination", type=Path, metavar="DST")
    action.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    action.add_argument("--dataset", default="", help="its name in the recipe (if there are more)")
    action.add_argument(
        "--part", metavar="I/N", help="every N-th shard from the I-th on (default: rank of ranks)"
    )
    action.set_defaults(act=_encode)


def _add_demo(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    action = actions.add_parser(
        "demo",
        help="make a dataset of real clips and pictures from installed packages",
        description="Real clips, and a theatre of pictures that move over photographs with exact "
        "captions and sounds of known onset; the same options give the same bytes.",
    )
    action.add_argument("destination", type=Path, metavar="DST")
    action.add_argument("--num-clips", type=int, default=2000, help="default: %(default)s")
    action.add_argument("--num-images", type=int, default=300, help="default: %(default)s")
    action.add_argument("--num-sounds", type=int, default=200, help="default: %(default)s")
    action.add_argument(
        "--num-bounces", type=int, default=0, help="clips of a ball that clicks when it bounces"
    )
    action.add_argument(
        "--num-edits",
        type=int,
        default=0,
        help="pictures after the reference pictures that they follow from (default: %(default)s)",
    )
    action.add_argument("--no-real-clips", action="store_true", help="the theatre's clips only")
    action.add_argument(
        "--size", type=int, default=64, help="pixels of a side (default: %(default)s)"
    )
    action.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    action.add_argument(
        "--actions",
        default="move,turn,grow,shrink",
        help="what may happen, separated by commas (default: %(default)s)",
    )
    action.add_argument("--backgrounds", choices=("photo", "plain"), default="photo")
    action.add_argument("--num-sprites", type=int, help="how many pictures act (default: all)")
    action.add_argument(
        "--sprites",
        default="",
        metavar="NAMES",
        help="which pictures act, such as 'frog,fire engine' (default: all)",
    )
    action.add_argument(
        "--sounds",
        choices=("action", "object"),
        default="action",
        help="what is heard goes with what happens, or with what acts; then captions name it "
        "(default: %(default)s)",
    )
    action.add_argument(
        "--stamps", type=Path, metavar="DIR", help="a folder of NAME.png with NAME.txt to act, too"
    )
    action.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    action.set_defaults(act=_demo)


def _add_curate(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    action = actions.add_parser(
        "curate",
        help="copy a small dataset with scores of its media, for recipes to filter on",
        description="Measures motion, shot cuts, sharpness (clarity) and silence of every medium, "
        "and how much of its picture is text.",
    )
    action.add_argument("source", type=Path, metavar="SRC")
    action.add_argument("destination", type=Path, metavar="DST")
    action.add_argument("--name", default="", help="name of the dataset (default: that of DST)")
    action.add_argument(
        "--text",
        choices=("auto", "yes", "no"),
        default="auto",
        help="measure how much is text: if the extra `ocr` is installed, always, never "
        "(default: %(default)s)",
    )
    action.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    action.add_argument(
        "--shots",
        choices=("own", "pyscenedetect", "transnetv2"),
        default="own",
        help="what finds shot cuts; the others are in the extra `shots` (default: %(default)s)",
    )
    action.add_argument(
        "--decode-limit-s",
        type=float,
        default=600.0,
        metavar="S",
        help="how long a medium may take before its decoder is killed (default: %(default)g)",
    )
    action.set_defaults(act=_curate)


def _curate(args: argparse.Namespace) -> int:
    from kinodit.data.config import DecodeConfig
    from kinodit.data.curate import curate
    from kinodit.data.ocr import is_there

    with_text = args.text == "yes" or (args.text == "auto" and is_there())
    line = ProgressLine("samples")
    report = curate(
        args.source,
        args.destination,
        with_text=with_text,
        shots=args.shots,
        workers=args.workers,
        limits=DecodeConfig(decode_limit_s=args.decode_limit_s),
        name=args.name,
        progress=lambda done, total: line.show(done, total, ""),
    )
    line.end()
    for key, reason in report.left_out:
        print(f"left out: {key}: {reason}", file=sys.stderr)
    if args.text == "auto" and not with_text:
        print(
            "scores.ocr is not measured: its detector is not installed "
            "(pip install 'kinodit[ocr]')",
            file=sys.stderr,
        )
    left_out = f", {len(report.left_out)} left out" if report.left_out else ""
    print(f"{args.destination}: {report.manifest.num_samples} samples with scores{left_out}")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from kinodit.data.pack import Progress, pack

    line = ProgressLine("files")

    def progress(now: Progress) -> None:
        bad = f", {now.num_bad} bad" if now.num_bad else ""
        line.show(now.done, now.total, f"{now.num_bytes / 2**20:.1f} MiB{bad}")

    report = pack(
        args.source,
        args.destination,
        name=args.name,
        shard_bytes=args.shard_mb << 20,
        skip_bad=args.skip_bad,
        allow_uncaptioned=args.allow_uncaptioned,
        progress=progress,
    )
    line.end()
    for reason in report.bad:
        print(f"left out: {reason}", file=sys.stderr)
    for suffix, count in report.ignored.items():
        print(f"ignored: {count} files {suffix}", file=sys.stderr)
    manifest = report.manifest
    left_out = f", {len(report.bad)} left out" if report.bad else ""
    print(
        f"{args.destination}: {manifest.num_samples} samples in {len(manifest.shards)} shard(s), "
        f"{report.num_bytes / 2**20:.1f} MiB{left_out}"
    )
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _demo(args: argparse.Namespace) -> int:
    from kinodit.data.demo.build import DemoOptions, build
    from kinodit.data.demo.theatre import TheatreOptions

    theatre = TheatreOptions(
        size=args.size,
        seed=args.seed,
        actions=_names(args.actions),
        backgrounds=args.backgrounds,
        num_sprites=args.num_sprites,
        sprites=_names(args.sprites),
        sounds=args.sounds,
        stamps=args.stamps,
    )
    options = DemoOptions(
        theatre,
        args.num_clips,
        args.num_images,
        args.num_sounds,
        not args.no_real_clips,
        args.num_bounces,
        args.num_edits,
    )
    line = ProgressLine("samples")
    manifest = build(
        args.destination, options, args.workers, lambda done, total: line.show(done, total, "")
    )
    line.end()
    print(
        f"{args.destination}: {manifest.num_samples} samples in {len(manifest.shards)} shard(s) "
        "(credits: docs/media.md)"
    )
    return 0


def _encode(args: argparse.Namespace) -> int:
    import torch

    from kinodit.data.validation_parts import parse_part
    from kinodit.launch.topology import read_topology
    from kinodit.trainer.caching import encode_dataset
    from kinodit.trainer.config import load_config

    topology = read_topology()
    part = parse_part(args.part) if args.part else (topology.rank, topology.world_size)
    config = load_config(args.recipe, args.overrides)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", topology.local_rank % torch.cuda.device_count())
    line = ProgressLine("samples")
    report = encode_dataset(
        config,
        args.dataset,
        args.destination,
        device,
        part,
        lambda done, total: line.show(done, total, ""),
    )
    line.end()
    for reason in report.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    state = "complete" if report.is_complete else "other parts are not done yet"
    print(
        f"{args.destination}: {report.num_encoded} samples encoded, {report.num_kept} shard(s) "
        f"were there, {len(report.left_out)} samples left out; {state}"
    )
    return 0


def _validate(args: argparse.Namespace) -> int:
    from kinodit.data.validate import validate
    from kinodit.data.validation_parts import merge_reports, parse_part, save_report

    part = parse_part(args.part)
    if args.reports is not None:
        report = merge_reports(args.directory, args.reports)
    else:
        line = ProgressLine("samples")
        report = validate(
            args.directory,
            decode=args.decode,
            part=part,
            progress=lambda done, all_: line.show(done, all_, ""),
        )
        line.end()
    if args.report is not None:
        save_report(args.report, part, report)
    for problem in report.problems:
        print(problem)
    verdict = f"{len(report.problems)} problems" if report.problems else "no problems"
    print(
        f"{args.directory}: {report.num_good} of {report.num_samples} samples are good; {verdict}"
    )
    return PROBLEMS_FOUND if report.problems else 0


def _stats(args: argparse.Namespace) -> int:
    from kinodit.data.manifest import Dataset
    from kinodit.data.stats import collect, table

    stats = collect(Dataset(args.directory))
    print(json.dumps(asdict(stats), indent=2) if args.json else table(stats))
    return 0


def _preview(args: argparse.Namespace) -> int:
    from kinodit.data.manifest import Dataset
    from kinodit.data.preview import preview

    out = args.out or args.directory.resolve().with_suffix(".preview.html")
    line = ProgressLine("samples")
    shown = preview(
        Dataset(args.directory),
        out,
        args.num_samples,
        args.seed,
        lambda done, total: line.show(done, total, ""),
    )
    line.end()
    print(f"{out}: {shown} samples, {out.stat().st_size / 2**20:.1f} MiB")
    return 0
