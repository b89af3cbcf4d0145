"""Figures of packs that the documentation quotes, on a small part of each mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Import = Callable[[str], Any]


@pytest.mark.slow
def test_packed_rows_reach_their_goals_and_rivals_do_not(benchmark_module: Import) -> None:
    balance = benchmark_module("loader_balance")
    balance.CLASS_WINDOW_STEPS = 8
    rows = {row.name: row for row in balance.rows(2048 * 8)}
    assert all(row.ok for name, row in rows.items() if not name.startswith("balance/class"))
    assert rows["balance/buckets"].value > 2 and rows["balance/random"].value > 2
    assert rows["padding/random"].value > 0.5
    assert len(rows) == 18


def test_waiting_is_what_ranks_wait(benchmark_module: Import) -> None:
    balance = benchmark_module("loader_balance")
    even = np.full(128, 5)
    assert balance.waiting(even) == 1.0
    even[3] = 10
    assert balance.waiting(even) == (10 + 5) / (5 + 5 / 64 + 5)
