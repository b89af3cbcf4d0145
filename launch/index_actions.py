"""`kinodit data index` and `export-energon`: datasets out of shards that lie there already."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kinodit.launch.progress_line import ProgressLine

_MIB = 1 << 20


def add_index_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the actions to those of `kinodit data`."""
    action = actions.add_parser(
        "index",
        help="give existing WebDataset shards (*.tar) an index and a manifest, in place",
        description="Shards of webdataset, img2dataset, video2dataset, Megatron-Energon and others "
        "are only read. The same command goes on where it was interrupted.",
    )
    action.add_argument("directory", type=Path, metavar="DIR")
    action.add_argument("--name", default="", help="name of the dataset (default: the folder's)")
    action.add_argument(
        "--skip-bad", action="store_true", help="leave out what is damaged, and say what it was"
    )
    action.add_argument(
        "--split",
        default="",
        metavar="NAME",
        help="index the shards of this split of energon's .nv-meta, without what it excludes",
    )
    action.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that read shards (default: %(default)s)",
    )
    action.add_argument(
        "--hash",
        choices=("blake3", "sha256"),
        help="what names the bytes of shards (default: as in the manifest that is there, else "
        "blake3)",
    )
    action.set_defaults(act=_index)
    action = actions.add_parser(
        "export-energon",
        help="write .nv-meta and NAME.tar.idx, so that Megatron-Energon reads the folder",
    )
    action.add_argument("directory", type=Path, metavar="DIR")
    action.set_defaults(act=_export_energon)


def _index(args: argparse.Namespace) -> int:
    from kinodit.data.indexing import IndexOptions, Progress, index_shards
    from kinodit.data.nv_meta import read_split

    split = read_split(args.directory, args.split) if args.split else None
    options = IndexOptions(
        skip_bad=args.skip_bad,
        files=split.files if split else None,
        without=split.without if split else None,
        workers=args.workers,
        algorithm=args.hash,
    )
    line = ProgressLine("MiB")

    def progress(now: Progress) -> None:
        line.show(now.done_bytes // _MIB, now.total_bytes // _MIB, f"{now.num_samples} samples")

    name = args.name or args.directory.resolve().name
    report = index_shards(args.directory, name, options, progress)
    line.end()
    for shard, damage in report.left_out:
        who = f"sample {damage.key!r}" if damage.key else "a sample"
        print(f"left out: {shard}: {who} at byte {damage.offset}: {damage.reason}", file=sys.stderr)
    if split is not None and not args.skip_bad:
        split.check(report)
    manifest = report.manifest
    left_out = f", {len(report.left_out)} left out" if report.left_out else ""
    kept = f"; {report.num_kept} were indexed before" if report.num_kept else ""
    print(
        f"{args.directory}: {manifest.num_samples} samples in {len(manifest.shards)} shard(s)"
        f"{left_out}{kept}"
    )
    return 0


def _export_energon(args: argparse.Namespace) -> int:
    from kinodit.data.manifest import Dataset
    from kinodit.data.nv_meta import write_nv_meta

    line = ProgressLine("samples")
    folder = write_nv_meta(Dataset(args.directory), lambda done, total: line.show(done, total, ""))
    line.end()
    print(f"{folder}: energon reads {args.directory} (CrudeWebdataset, split 'train')")
    return 0
