"""Which engines a certificate is asked for, and that each speaks for itself alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kinodit.models.errors import ConfigError
from kinodit.trainer.certify import engines
from kinodit.trainer.certify.certificate import TABLES, Certificate, shown_kinds
from kinodit.trainer.certify.engines import ENGINES, can_have, certified_as, chosen_engines
from kinodit.trainer.certify.layouts import layout_name, parse_layouts
from kinodit.trainer.certify.run import Row
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import RunConfig, load_config
from kinodit.trainer.engine.config import DeepSpeedConfig, MegatronConfig, NativeConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT


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
    kernels = MegatronConfig(attention="transformer_engine")
    with pytest.raises(ConfigError, match="nothing but CUDA runs megatron-transformer_engine"):
        chosen_engines("own", kernels)
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


def test_a_row_speaks_for_its_engine_alone() -> None:
    rows = (row("tp=2", "native"), row("dp_shard=2", "zero3"), row("tp=2", "zero3", ok=False))
    assert shown_kinds(rows) == {frozenset({"tp"})}
    assert shown_kinds(rows, "zero3") == {frozenset({"dp_shard"})}
    assert shown_kinds(rows, "zero1") == frozenset()


def measured(engine: str) -> Row:
    return Row("tp=2", "float64", 2, None, (), engine=engine)


def test_a_changed_library_driver_ends_the_rows_of_its_engines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models", "trainer"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("kinodit.__file__", str(tmp_path / "__init__.py"))
    small, path = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")), tmp_path / "c.json"
    every = [measured(name) for name in ENGINES]

    def left(changed: str) -> set[str]:
        """Engines whose rows are kept when a native row is measured after the change."""
        Certificate.of(small, every).save(path)
        file = tmp_path / changed
        before = file.read_text()
        file.write_text(before + "# changed\n")
        Certificate.of(small, [measured("native")]).save(path)
        file.write_text(before)
        return {row["engine"] for row in json.loads(path.read_text())["rows"]}

    zero = {name for name in ENGINES if name.startswith("zero")}
    megatron = {name for name in ENGINES if "megatron" in name}
    assert left("trainer/engine/deepspeed/driver.py") == ENGINES.keys() - zero
    assert left("trainer/engine/zero_config.py") == ENGINES.keys() - zero
    assert left("trainer/engine/megatron/linears.py") == ENGINES.keys() - megatron
    assert left("trainer/engine/config.py") == {"native"}
    assert left("trainer/engine/refusals.py") == set(ENGINES), "what refuses decides no gradient"
    assert left("trainer/engine/base.py") == left("trainer/step.py") == {"native"}
    assert left("models/presets.py") == set(ENGINES)
    for name in TABLES:
        assert (ROOT / name).exists()
