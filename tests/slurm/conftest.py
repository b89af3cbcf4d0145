"""One cluster for each module of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.lab import SlurmLab


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    """Three nodes."""
    cluster = SlurmLab(3)
    yield cluster
    cluster.close()
