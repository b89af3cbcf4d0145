"""`kinodit checkpoint VERB`: what a run has saved, is it good; to DeepSpeed and back."""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from kinodit.launch.progress_line import ProgressLine
from kinodit.models.errors import UserError

HELP = "List, describe, check, thin out, export and import the checkpoints of a run."
BROKEN = 1


class PathError(UserError):
    """What was named is no checkpoint and no run that has any."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verb = verbs.add_parser("ls", help="one line for each checkpoint of a run")
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run")
    verb.set_defaults(act=_list)
    verb = verbs.add_parser("inspect", help="what one consists of, and what it was made by")
    verb.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run (its newest)")
    verb.set_defaults(act=_inspect)
    verb = verbs.add_parser("verify", help="read and hash every byte; exit code 1 if one is broken")
    verb.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run (all of it)")
    verb.set_defaults(act=_verify)
    verb = verbs.add_parser("prune", help="remove old checkpoints")
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run")
    verb.add_argument("--keep-last", type=int, required=True, metavar="N", help="at least 1")
    verb.add_argument("--quarantine", action="store_true", help="empty the quarantine, too")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    verb.set_defaults(act=_prune)
    verb = verbs.add_parser("export", help="write one as a DeepSpeed universal checkpoint")
    verb.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run (its newest)")
    verb.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    verb.set_defaults(act=_export)
    verb = verbs.add_parser("import", help="begin a run from a DeepSpeed universal checkpoint")
    verb.add_argument("path", type=Path, metavar="UNIVERSAL", help="the folder that holds zero/")
    verb.add_argument("config", type=Path, metavar="CONFIG", help="the recipe of the run")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    verb.add_argument("--steps", type=int, metavar="N", help="updates behind it, if it cannot say")
    verb.set_defaults(act=_import)


def run(args: argparse.Namespace) -> int:
    """Run the verb that was asked for; its exit code."""
    return int(args.act(args))


def _show(line: ProgressLine, name: str, done: int, total: int) -> None:
    line.show(done >> 20, total >> 20, name)


def _list(args: argparse.Namespace) -> int:
    from kinodit.trainer.checkpoint import folder as disk

    latest = disk.read_latest(args.run_dir)
    for path in _checkpoints(args.run_dir):
        state = "whole" if disk.is_whole(path) else "BROKEN (kinodit checkpoint verify says where)"
        hint = "  latest" if path.name == latest else ""
        print(f"{path.name}  {_size(path):>10}  {state}{hint}")
    aside = args.run_dir / disk.FOLDER / disk.QUARANTINE
    for path in sorted(aside.glob("*")):
        print(f"{disk.QUARANTINE}/{path.name}  {_size(path):>10}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from kinodit.trainer.checkpoint import load_state, read_manifest

    path = _chosen(args.path)[-1]
    manifest, state = read_manifest(path), load_state(path)
    print(f"{path}\nstep {state.step}, {state.num_samples} samples, {state.num_tokens} tokens")
    for section in ("mesh", "versions"):
        facts: dict[str, Any] = manifest.facts.get(section, {})
        print(f"{section}: {', '.join(f'{name} {value}' for name, value in facts.items())}")
    print(f"recipe: kinodit config show {path.parent.parent}")
    for name, record in sorted(manifest.files.items()):
        print(f"  {record.sha256[:12]}  {_in_units(record.size):>10}  {name}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from kinodit.trainer.checkpoint import verify

    broken = 0
    for path in _chosen(args.path):
        line = ProgressLine("MiB")
        problems = verify(path, partial(_show, line, path.name))
        line.end()
        broken += bool(problems)
        print(f"{path.name}: {'good' if not problems else 'BROKEN'}", flush=True)
        for problem in problems:
            print(f"  {problem}")
    return BROKEN if broken else 0


def _prune(args: argparse.Namespace) -> int:
    from kinodit.trainer.checkpoint import folder as disk

    if args.keep_last < 1:
        raise PathError(f"--keep-last {args.keep_last}: at least one checkpoint has to stay")
    _checkpoints(args.run_dir)
    removed = "would be removed" if args.dry_run else "removed"
    line, old = ProgressLine("checkpoints"), disk.prunable(args.run_dir, args.keep_last)
    for number, path in enumerate(old):
        line.show(number, len(old), path.name)
        size = _size(path)
        if not args.dry_run:
            disk.discard(path)
        line.end()
        print(f"{path.name}  {size:>10}  {removed}")
    aside = args.run_dir / disk.FOLDER / disk.QUARANTINE
    for path in sorted(aside.glob("*")) if args.quarantine else []:
        size = _size(path)
        if not args.dry_run:
            shutil.rmtree(path)
        print(f"{disk.QUARANTINE}/{path.name}  {size:>10}  {removed}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from kinodit.trainer.checkpoint.universal import export_universal

    path = _chosen(args.path)[-1]
    print(f"{export_universal(path, args.out)} parameters of {path.name} are in {args.out}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from kinodit.trainer.config import load_config
    from kinodit.trainer.importing import import_universal
    from kinodit.trainer.resilience.lock import keep_to_group

    keep_to_group()
    path = import_universal(args.path, load_config(args.config, args.overrides), args.steps)
    print(f"{path}: kinodit train {args.config} goes on from it")
    return 0


def _checkpoints(run_dir: Path) -> list[Path]:
    from kinodit.trainer.checkpoint import find_checkpoints

    found = find_checkpoints(run_dir)
    if not found:
        raise PathError(f"{run_dir} has no checkpoint: name the folder of a run that saved one")
    return found


def _chosen(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or those of the run that it is, oldest first."""
    from kinodit.trainer.checkpoint import MANIFEST_FILE

    return [path.resolve()] if (path / MANIFEST_FILE).is_file() else _checkpoints(path)


def _size(path: Path) -> str:
    return _in_units(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def _in_units(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"
