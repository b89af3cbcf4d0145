"""What most of these tests need: ranks that may be killed, and the recipe that they train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lives import Lives
from tests.support.recipes import tiny_recipe, write_dataset


@pytest.fixture(scope="session")
def lives() -> Iterator[Lives]:
    """Starts groups of ranks."""
    group = Lives()
    yield group
    group.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips."""
    return write_dataset(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def recipe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dataset: Path
) -> Path:
    """A tiny recipe with the module's `SECTIONS`; its runs lie beside it."""
    root = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    sections = dict(request.module.SECTIONS)
    sections["run"] = {"out_dir": str(root), **sections.get("run", {})}
    return tiny_recipe(root, dataset, **sections)
