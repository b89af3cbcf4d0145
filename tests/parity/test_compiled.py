"""Compiled blocks under each axis train as one process does with eager ones, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kinodit.trainer.certify.layouts import parse_layouts
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT


@pytest.fixture(scope="module")
def certifier() -> Iterator[Certifier]:
    overrides = ["model.num_double_blocks=1", "model.num_single_blocks=1"]
    made = Certifier(twin(load_config(ROOT / "configs" / "t2v_tiny.yaml", overrides)))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["tp=2", "cp=2", "cp=2,ring=2", "dp_shard=2"])
def test_compiled_layouts(layout: str, certifier: Certifier) -> None:
    (parallel,) = parse_layouts(layout, ParallelConfig())
    row = certifier(Case(parallel, variant="compiled"))
    assert row.ok, (row.faults, row.where, row.cause)
    assert row.verdict is not None and 0 < row.verdict.max_gradient_error < 1e-12
