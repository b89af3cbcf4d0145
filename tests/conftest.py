"""Settings every test runs under."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.compiled import built, folders_below

if TYPE_CHECKING:
    from tests.support.ranks import Groups, Ranks

# Set before torch is imported: tests start processes of their own on few cores, and one thread
# each is both faster there and the same order of summation everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Modules are compiled once, whatever the environment says: every process of pytest would compile
# all tests anew to collect them, which takes it as long again, and every other process what it
# imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Nothing may be fetched at run time.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that itself runs under torchrun or Slurm must not inherit a world from it."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    for name in list(os.environ):
        if name in launcher or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def pytest_configure(config: pytest.Config) -> None:
    """In the default run, builds at run time go where they are noticed; others keep theirs."""
    if "not slow" in config.option.markexpr:
        folder = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ.update(folders_below(Path(folder.name)))


@pytest.fixture(autouse=True)
def _nothing_is_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of the default run makes anything compile, in any process."""
    is_default = "not slow" in request.config.option.markexpr
    before = built(os.environ) if is_default else set()
    yield
    if is_default:
        new = sorted(built(os.environ) - before)
        assert not new, f"compiled at run time, or about to be: {new}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        choices=("ci", "full"),
        default="ci",
        help="how much the long suites do: minutes, or all of it (make proof keeps the figures)",
    )
    parser.addoption(
        "--seconds",
        type=seconds,
        default=math.inf,
        metavar="S",
        help="begin no test after so many seconds; the order is another one with every commit",
    )


def seconds(text: str) -> float:
    """A duration.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, needs a number of seconds above 0")
    return found


STARTED_S = pytest.StashKey[float]()
TURN = "left to another commit's turn"


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED_S] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files, and the tests of each, in the order that the commit draws where there is a limit."""
    from tests.support.sampling import shuffled

    if config.getoption("--seconds") == math.inf:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    items[:] = [
        item
        for path in shuffled(list(files), "files")
        for item in shuffled(files[path], str(path.relative_to(config.rootpath)))
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing that no time is left for."""
    spent_s = time.monotonic() - item.config.stash[STARTED_S]
    if spent_s > item.config.getoption("--seconds"):
        pytest.skip(TURN)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Tests that decode have a server of processes in no time, instead of in seconds."""
    if "kinodit.data.worker" in sys.modules:
        from kinodit.data.fork_server import fork_early

        fork_early()


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    """`ci` or `full`."""
    chosen: str = request.config.getoption("--size")
    return chosen


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """Number of ranks -> a group of so many, for all tests of a file, started when first used."""
    from tests.support.ranks import Groups

    made = Groups()
    yield made
    made.close()


@pytest.fixture(scope="module")
def two(groups: Groups) -> Ranks:
    """A group of two ranks."""
    return groups[2]


@pytest.fixture(scope="module")
def four(groups: Groups) -> Ranks:
    """A group of four ranks."""
    return groups[4]
