"""Which engines a certificate is asked for, and that each speaks for itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinodit.models.errors import ConfigError
from kinodit.trainer.certify import engines
from kinodit.trainer.certify.certificate import Certificate, shown_kinds
from kinodit.trainer.certify.engines import ENGINES, can_have, certified_as, chosen_engines
from kinodit.trainer.certify.layouts import layout_name, parse_layouts
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.config import DeepSpeedConfig, NativeConfig
from kinodit.trainer.parallel.mesh import ParallelConfig


def row(layout: str, engine: str, ok: bool = True) -> dict[str, Any]:
    return {"layout": layout, "engine": engine, "dtype": "float64", "ok": ok}


def test_engines_are_chosen_by_name() -> None:
    own = DeepSpeedConfig(stage=3)
    assert chosen_engines("own", own) == ["zero3"]
    assert chosen_engines("own", NativeConfig()) == ["native"]
    assert chosen_engines("zero1, native", own) == ["zero1", "native"]
    for wrong in ("zero4", "", "native,fsdp"):
        with pytest.raises(ConfigError, match="zero3"):
            chosen_engines(wrong, own)
    assert all(certified_as(engine) == name for name, engine in ENGINES.items())


def test_all_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_missing", lambda name: name == "deepspeed")
    chosen = chosen_engines("all", NativeConfig())
    assert "native" in chosen and "zero1" not in chosen


def test_layouts_that_an_engine_refuses_are_no_rows() -> None:
    config = RunConfig()
    for text, expected in (("dp_replicate=2", False), ("dp_shard=2,tp=2", True), ("1", True)):
        (layout,) = parse_layouts(text, ParallelConfig())
        assert can_have(ENGINES["zero3"], layout, config) is expected
        assert can_have(ENGINES["native"], layout, config)
        assert layout_name(layout) == text


def test_a_row_speaks_for_its_engine_alone(tmp_path: Path) -> None:
    rows = (row("tp=2", "native"), row("dp_shard=2", "zero3"), row("tp=2", "zero3", ok=False))
    assert shown_kinds(rows) == {frozenset({"tp"})}
    assert shown_kinds(rows, "zero3") == {frozenset({"dp_shard"})}
    certificate = Certificate("key", shown_kinds(rows), rows)
    assert certificate.shown_by("native") == {frozenset({"tp"})}
    assert certificate.shown_by("zero3") == {frozenset({"dp_shard"})}
    assert certificate.shown_by("zero1") == frozenset()
