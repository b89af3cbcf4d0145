"""What the documents say exists: links, files, functions, commands, make targets."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinodit.launch.cli import COMMANDS, build_parser
from tests.repo.test_layout import ROOT

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").glob("*.md")]
)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
NAMED_CODE = re.compile(
    r"`((?:models|data|trainer|launch|slurm|configs|tests|constraints|benchmarks|docs)/[\w./-]*)"
    r"(?:: ([A-Za-z_][\w.]*))?`"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def defined(source: str) -> set[str]:
    """Functions, classes, methods and constants of a module."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if hasattr(item, "name")}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of every command line in the console and bash blocks of a document."""
    for language, body in FENCE.findall(text):
        if language in {"console", "bash", "sh"}:
            for line in body.replace("\\\n", " ").splitlines():
                if language == "console" and not line.startswith("$ "):
                    continue
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    yield words


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    broken = [
        target
        for target, _ in LINK.findall(path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_and_functions_that_are_named_exist(path: Path) -> None:
    missing = []
    for file, symbol in NAMED_CODE.findall(path.read_text()):
        if not (ROOT / file).exists():
            missing.append(file)
        elif symbol and symbol not in defined((ROOT / file).read_text()):
            missing.append(f"{file}: {symbol}")
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_that_are_shown_are_understood(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in shell_commands(path.read_text()):
        program = os.path.basename(words[0])  # noqa: PTH119 - a word, not a path
        if program == "make":
            asked = {word for word in words[1:] if "=" not in word}
            assert asked <= targets, words
        elif program == "kinodit" or "kinodit" in words:
            arguments = words[words.index("kinodit") + 1 :] if "kinodit" in words else words[1:]
            build_parser(arguments).parse_args(arguments)


def test_the_readme_shows_both_commands_and_every_top_level_folder() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text
    for folder in ("models", "data", "trainer", "launch", "configs", "slurm", "tests"):
        assert f"`{folder}/`" in text


def test_the_checks_see_what_is_wrong() -> None:
    assert NAMED_CODE.findall("`data/plan.py: no_such`") == [("data/plan.py", "no_such")]
    assert list(shell_commands("```console\n$ kinodit bake x  # why\n$ ls\n```\n")) == [
        ["kinodit", "bake", "x"],
        ["ls"],
    ]
    assert "bake" not in COMMANDS
    with pytest.raises(SystemExit):
        build_parser(["bake"]).parse_args(["bake"])
    assert "build_parser" in defined((ROOT / "launch/cli.py").read_text())
