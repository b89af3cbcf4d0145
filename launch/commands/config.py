"""`kinodit config`: show a resolved recipe, describe every key, compare two recipes."""

from __future__ import annotations

import argparse
import inspect
from itertools import groupby
from pathlib import Path

import yaml

from kinodit.models.errors import ConfigError

HELP = "Show a recipe as it resolves, describe every key there is, compare two recipes."

DIFFERENT = 1
"""Exit code of `config diff` where the recipes differ, as diff(1) has it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per verb."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    show = verbs.add_parser("show", help="print a recipe with every default filled in")
    show.add_argument("config", type=Path, help="a recipe, or the folder of a run")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")

    describe = verbs.add_parser("schema", help="list every key with its type and default")
    describe.add_argument("prefix", nargs="?", default="", help="a key or section, e.g. optim")

    diff = verbs.add_parser("diff", help="print the keys in which two recipes differ")
    diff.add_argument("a", type=Path, help="a recipe, or the folder of a run")
    diff.add_argument("b", type=Path, help="likewise")


def run(args: argparse.Namespace) -> int:
    """Run the verb that was asked for; `diff` returns 1 where it found a difference."""
    if args.verb == "show":
        print(_resolved(args.config, args.overrides), end="")
        return 0
    if args.verb == "schema":
        return _describe(args.prefix)
    return _diff(args.a, args.b)


def _resolved(path: Path, overrides: list[str]) -> str:
    """The complete recipe as YAML without secrets; a run's folder keeps its own in config.yaml."""
    from kinodit.trainer.config import config_to_yaml, load_config

    return config_to_yaml(load_config(path / "config.yaml" if path.is_dir() else path, overrides))


def _describe(prefix: str) -> int:
    from kinodit.trainer.config import schema

    rows = schema()
    below = f"{prefix}." if prefix else ""
    chosen = [row for row in rows if row.key == prefix or row.key.startswith(below)]
    if not chosen:
        sections = ", ".join(dict.fromkeys(row.key.split(".")[0] for row in rows))
        raise ConfigError(f"there is no key {prefix!r}, nor one below it; sections: {sections}")
    for doc, group in groupby(chosen, key=lambda row: row.doc):
        print("\n".join(f"# {line}" for line in inspect.cleandoc(doc).splitlines() if line))
        for row in group:
            print(f"{row.key}: {row.type} = {row.default}")
        print()
    return 0


def _diff(a: Path, b: Path) -> int:
    from kinodit.trainer.config import differences

    changed = differences(yaml.safe_load(_resolved(a, [])), yaml.safe_load(_resolved(b, [])))
    if not changed:
        print("no difference")
        return 0
    print(f"--- {a}\n+++ {b}")
    for key, old, new in changed:
        print(f"- {key}: {old}\n+ {key}: {new}")
    return DIFFERENT
