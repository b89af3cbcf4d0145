"""Which of the trainings the small size runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sampling import sampled

NUM_FILES = 3
"""Files of the small size, others with every commit: all take over a quarter of an hour."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the other files, unless few were asked for by name."""
    here = Path(__file__).parent
    files = sorted({item.path for item in items if item.path.parent == here})
    kept = sampled(files, NUM_FILES, config.getoption("--size"), "learning")
    left_out = [item for item in items if item.path in files and item.path not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
