"""Engines on CUDA devices, against one process, by rows of a certificate."""

from __future__ import annotations

import pytest

from kinodit.trainer.certify.engines import ENGINES
from kinodit.trainer.certify.layouts import parse_layouts
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.engine.config import DeepSpeedConfig, MegatronConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT


def assert_as_alone(
    recipe: str,
    layout: str,
    engine: DeepSpeedConfig | MegatronConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin of configs/`recipe`.yaml trains with `engine` as in one process, in bfloat16."""
    monkeypatch.setitem(ENGINES, "asked for", engine)
    small = twin(load_config(ROOT / "configs" / f"{recipe}.yaml"))
    (parallel,) = parse_layouts(layout, ParallelConfig())
    certifier = Certifier(small, "cuda")
    try:
        row = certifier(Case(parallel, "bfloat16", "asked for"))
    finally:
        certifier.close()
    assert row.ok, row.faults
