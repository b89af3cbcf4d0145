"""Bytes at rest that the documentation quotes, of the smallest preset that it quotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Import = Callable[[str], Any]


@pytest.mark.slow
def test_every_rank_has_its_share(benchmark_module: Import) -> None:
    state = benchmark_module("state")
    presets = state.large_presets()
    assert len(presets) > 5
    rows = list(state.rows_of("300m", presets["300m"], ["fsdp8", "fsdp8 x tp4"]))
    assert len(rows) == 2
    for row in rows:
        assert row.ok and row.value >= 1.0


@pytest.mark.slow
def test_the_first_rank_has_the_most(benchmark_module: Import) -> None:
    state = benchmark_module("state")
    config, parallel = state.large_presets()["300m"], state.LAYOUTS["fsdp256"]
    sizes = [state.state_bytes(config, parallel, rank) for rank in (0, 200, 255)]
    assert sizes[0] == max(sizes) > min(sizes)
