"""The tree is the architecture: links, guards, names and sizes of files."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("configs", "data", "launch", "models", "slurm", "trainer")
PACKAGES = ("data", "launch", "models", "trainer")
OWN_FOLDERS = (*PACKAGES, "src", "tests", "benchmarks", "constraints", "docs")
MAX_LINES = 500
EMPTY_NAMES = re.compile(r"(^|_)(utils?|helpers?|misc|common|stuff|tools)(_|$)")


def python_files(*folders: str) -> list[Path]:
    """Own Python files, each once: links are not followed."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def test_links_are_relative_and_lead_to_the_top_level_folders() -> None:
    package = ROOT / "src" / "kinodit"
    links = {path.name: path.readlink() for path in package.iterdir() if path.is_symlink()}
    assert links == {name: Path("../..") / name for name in LINKS}
    for name in LINKS:
        assert (package / name).resolve() == ROOT / name
    real = {path.name for path in package.iterdir()} - set(LINKS) - {"__pycache__"}
    assert real == {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("name", PACKAGES)
def test_importing_a_folder_by_its_own_name_says_what_to_import(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: import this package as 'kinodit.{name}', not '{name}'"


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_under_their_one_name(name: str) -> None:
    assert importlib.import_module(f"kinodit.{name}").__name__ == f"kinodit.{name}"


def test_every_folder_of_modules_is_a_package() -> None:
    missing = {
        path.parent
        for path in python_files(*PACKAGES)
        if not (path.parent / "__init__.py").exists()
    }
    assert not missing


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in python_files(*OWN_FOLDERS)
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_files_are_named_for_what_they_hold() -> None:
    named = [path.relative_to(ROOT) for path in python_files(*OWN_FOLDERS)]
    assert not [path for path in named if any(EMPTY_NAMES.search(Path(p).stem) for p in path.parts)]


def test_the_size_and_name_checks_see_the_code() -> None:
    assert len(python_files(*PACKAGES)) > 20
    assert EMPTY_NAMES.search("video_utils") and not EMPTY_NAMES.search("futility")
