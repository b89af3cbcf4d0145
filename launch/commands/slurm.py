"""`kinodit slurm`: batch scripts for Slurm, and the jobs that come of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kinodit.models.errors import UserError

HELP = "Render batch scripts, submit them, and look after their jobs."

FINISHED = 3
"""Exit code of `slurm folder` where the run has nothing left to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per verb."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    render = verbs.add_parser("render", help="print a batch script, or write it to --out")
    _add_recipe(render, nargs="?")
    _add_cluster(render)
    render.add_argument(
        "--template",
        default="train",
        help="train, evaluate, validate, validate_summary or encode (default: train)",
    )
    render.add_argument("--out", type=Path, help="write the script here, executable")
    render.set_defaults(act=_render)

    submit = verbs.add_parser(
        "submit", help="render the script that trains a recipe into the run's folder; submit it"
    )
    _add_recipe(submit)
    _add_cluster(submit)
    submit.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="an option of sbatch, as --sbatch=--partition=main; as often as needed",
    )
    submit.set_defaults(act=_submit)

    status = verbs.add_parser("status", help="how the jobs of a run stand")
    status.add_argument("run_folder", metavar="RUN", type=Path, help="the folder of a run")
    status.set_defaults(act=_status)

    logs = verbs.add_parser("logs", help="what the newest job of a run printed last")
    logs.add_argument("run_folder", metavar="RUN", type=Path, help="the folder of a run")
    logs.add_argument("--lines", type=int, default=40, help="how many (default: %(default)s)")
    logs.add_argument("--follow", action="store_true", help="go on with what is added")
    logs.set_defaults(act=_logs)

    folder = verbs.add_parser(
        "folder", help=f"print the folder of a recipe's run; {FINISHED} if the run is finished"
    )
    _add_recipe(folder)
    folder.set_defaults(act=_folder)


def _add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument(
        "config", type=Path, nargs=nargs, help="a recipe, for example configs/t2v_tiny.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", default="generic", help="a name in slurm/clusters, or a YAML file's path"
    )
    parser.add_argument("--nodes", type=int, default=0, help="the default of sbatch's --nodes")


def run(args: argparse.Namespace) -> int:
    """Run the verb that was asked for."""
    return int(args.act(args))


def _render(args: argparse.Namespace) -> int:
    from kinodit.launch.slurm.cluster import load_cluster
    from kinodit.launch.slurm.render import fill, other_job, training_job

    if args.template == "train":
        if args.config is None:
            raise UserError("slurm render: which recipe should the script train?")
        job = training_job(args.config, args.overrides, args.cluster, args.nodes, args.out)
    else:
        job = other_job(args.template, args.cluster, args.out)
    script = fill(job, load_cluster(args.cluster))
    if args.out is None:
        print(script, end="")
        return 0
    _write(args.out, script)
    print(f"wrote {args.out}; submit it with: sbatch {args.out}", file=sys.stderr)
    return 0


def _write(path: Path, script: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _submit(args: argparse.Namespace) -> int:
    from kinodit.launch.slurm.cluster import load_cluster
    from kinodit.launch.slurm.jobs import NOTES, submit
    from kinodit.launch.slurm.render import fill, training_job
    from kinodit.trainer.recipe import load_run_section

    folder = load_run_section(args.config, args.overrides).folder
    script = folder / NOTES / "train.sh"
    job = training_job(args.config, args.overrides, args.cluster, args.nodes, script)
    _write(script, fill(job, load_cluster(args.cluster)))
    job_id = submit(script, folder, args.sbatch)
    print(f"job {job_id}: kinodit slurm status {folder}, kinodit slurm logs {folder}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from kinodit.launch.slurm.jobs import status_table

    print(status_table(args.run_folder))
    return 0


def _logs(args: argparse.Namespace) -> int:
    from kinodit.launch.slurm.jobs import log_lines

    for line in log_lines(args.run_folder, args.lines, follow=args.follow):
        print(line, flush=args.follow)
    return 0


def _folder(args: argparse.Namespace) -> int:
    """Without torch: this runs at the head of every job, where a second is a second."""
    from kinodit.trainer.recipe import load_run_section
    from kinodit.trainer.resilience.signals import is_finished

    section = load_run_section(args.config, args.overrides)
    print(section.folder)
    return FINISHED if is_finished(section.folder, section.steps) else 0
