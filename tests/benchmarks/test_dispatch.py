"""The bytes that `benchmarks/moe.py` counts are the least there can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kinodit.trainer.certify.ranks import Ranks
from tests.support.ranks import ROOT


@pytest.mark.gloo
def test_rows_travel_once_each_way(benchmark_module: Callable[[str], Any]) -> None:
    ranks = Ranks(2, (str(ROOT / "benchmarks"),))
    try:
        found = ranks.run(benchmark_module("dispatch").dispatch)
    finally:
        ranks.close()
    assert [got for got, _ in found] == [least for _, least in found]
    assert min(least for _, least in found) > 0
