"""Settings every test runs under."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
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
        "--part",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="run this share of the chosen tests, others with every commit (0.5: half of them)",
    )


def share(text: str) -> float:
    """A part of a whole.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, needs a number above 0 and at most 1")
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `--part` does not draw, after other choices were made."""
    from tests.support.sampling import sampled

    part = config.getoption("--part")
    if part == 1:
        return
    kept = sampled(items, math.ceil(part * len(items)), "ci", "part")
    ids = {item.nodeid for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in ids])
    items[:] = kept


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
