"""The certificate's parts: twins keep the structure, layouts have names, differences have words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinodit.data.synthetic import synthetic_pack
from kinodit.launch import cli
from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.compare import compare
from kinodit.trainer.certify.layouts import (
    default_layouts,
    layout_name,
    num_ranks,
    parse_layouts,
)
from kinodit.trainer.certify.trace import SLOTS_OF_PACKS, Trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import RunConfig, load_config
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import ROOT

BASE = ParallelConfig()


def twin_of(model: MMDiTConfig) -> Twin:
    return twin(replace(RunConfig(), model=model))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_twin_is_small_and_of_the_same_structure(preset: str) -> None:
    small = twin_of(PRESETS[preset]).config.model
    with torch.device("meta"):
        ours = MMDiT(small)
        few = {"num_double_blocks": 2, "num_single_blocks": 2}
        deep = {key: min(value, getattr(PRESETS[preset], key)) for key, value in few.items()}
        theirs = MMDiT(replace(PRESETS[preset], **deep))
    assert sum(p.numel() for p in ours.parameters()) < 400_000
    names = {name for name, _ in theirs.named_parameters()}
    refined = {name for name in names if ".refiner.blocks.1." in name}
    assert {name for name, _ in ours.named_parameters()} == names - refined


def test_a_twin_keeps_ratios_and_says_what_it_shrank() -> None:
    model = replace(PRESETS["2b"], num_kv_heads=6, condition_width=768)
    made = twin_of(model)
    small = made.config.model
    assert small.num_heads // small.kv_heads == 4
    assert small.width_of_condition == small.width / 2
    shrunk = {key: (old, new) for key, old, new in made.shrunk}
    assert shrunk["model.width"] == (1536, small.width)
    assert "model.activation" not in shrunk
    odd = twin_of(replace(PRESETS["tiny"], width=210, num_heads=7, head_dim=30))
    assert odd.config.model.num_heads == 1


def test_layouts_have_names_that_read_back() -> None:
    text = "cp=2;dp_shard=2,cp=4,ring=2;dp_replicate=2,dp_shard=2"
    layouts = parse_layouts(text, BASE)
    assert ";".join(layout_name(layout) for layout in layouts) == text
    assert [num_ranks(layout) for layout in layouts] == [2, 8, 4]
    for wrong, message in (
        ("pp=2", "no axis 'pp'"),
        ("cp=x", "needs a number"),
        (" ; ", "names no"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_layouts(wrong, BASE)


def test_the_grid_has_every_axis_and_pair_that_fits() -> None:
    four_heads = twin_of(PRESETS["2b"]).config.model
    names = [layout_name(layout) for layout in default_layouts(four_heads, BASE, 4)]
    assert names[:5] == ["dp_replicate=2", "dp_shard=2", "cp=2", "cp=2,ring=2", "tp=2"]
    assert {"cp=4", "cp=4,ring=4", "cp=4,ring=2", "dp_shard=2,cp=2,ring=2"} <= set(names)
    assert {"tp=2", "tp=4", "dp_shard=2,tp=2", "dp_replicate=2,tp=2", "cp=2,ring=2,tp=2"} <= set(
        names
    )
    assert len(names) == len(set(names)) == 20
    one_head = replace(four_heads, num_heads=1, width=12)
    assert [layout_name(x) for x in default_layouts(one_head, BASE, 2)] == [
        "dp_replicate=2",
        "dp_shard=2",
        "cp=2,ring=2",
    ]


def test_synthetic_packs_are_odd_and_depend_on_nothing_but_step_and_slot() -> None:
    made = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))

    def pack(*slots: int) -> dict[str, torch.Tensor]:
        batch = synthetic_pack(3, slots, made.streams, made.conditions, torch.float64)
        return {name: tokens.latents for name, tokens in batch.modalities.items()}

    alone, together = pack(2), pack(0, 2)
    for name, latents in alone.items():
        assert torch.equal(together[name][-len(latents) :], latents)
    lengths = [len(pack(slot)["video"]) for slots in SLOTS_OF_PACKS for slot in slots]
    assert len(set(lengths)) > 4 and any(length % 2 for length in lengths)
    assert pack()["video"].shape == (0, made.streams["video"].channels)


def traces() -> tuple[Trace, Trace]:
    tensors = {"a": np.array([1.0, -4.0]), "b": np.array([0.5])}
    made = [
        Trace([1.0], [2.0], dict(tensors), dict(tensors), dict(tensors), {(0, 0): "x", (0, 1): "y"})
        for _ in range(2)
    ]
    return made[0], made[1]


def test_errors_are_scaled_by_the_largest_value_and_told_in_order() -> None:
    reference, candidate = traces()
    assert compare(reference, [candidate]).ok
    candidate.gradients["a"] = np.array([1.0, -4.0 + 4e-9])
    candidate.gradients["b"] = np.array([0.5 + 8e-9])
    verdict = compare(reference, [reference, candidate])
    assert verdict.max_gradient_error == pytest.approx(2e-9, rel=1e-3)
    assert verdict.parameter_error == verdict.loss_error == 0
    (fault,) = verdict.faults
    assert fault == "rank 1: 2 of 2 gradients are off, first a by 1.0e-09, most b by 2.0e-09"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_or_not_there_is_a_fault(value: float) -> None:
    reference, candidate = traces()
    candidate.parameters["b"] = np.array([value])
    assert not compare(reference, [candidate]).ok
    reference, candidate = traces()
    candidate.losses = [value]
    assert "loss" in compare(reference, [candidate]).faults[0]
    reference, candidate = traces()
    del candidate.averages["b"]
    assert "averages" in compare(reference, [candidate]).faults[0]


def test_samples_that_are_missing_or_drawn_twice_are_told() -> None:
    reference, candidate = traces()
    other = traces()[1]
    candidate.draws, other.draws = {(0, 0): "x"}, {(0, 0): "z", (0, 9): "?"}
    assert compare(reference, [candidate, other]).faults[:3] == (
        "sample 0 of step 0 has other latents, noise or noise level",
        "sample 1 of step 0 never came",
        "sample 9 of step 0 belongs to no one",
    )


@pytest.mark.gloo
def test_the_command_prints_rows_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = str(ROOT / "configs" / "t2v_tiny.yaml"), tmp_path / "rows.json"
    layouts = "cp=2,ring=2;dp_shard=2"
    code = cli.main(["certify", recipe, "--layouts", layouts, "--json", str(file)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "width 128 -> 48" in printed
    assert "2 of 2 layouts train as one process does" in printed
    rows = json.loads(file.read_text())
    assert [row["layout"] for row in rows] == layouts.split(";")
    for row in rows:
        assert row["ok"] is True and row["dtype"] == "float64"
        assert 0 < row["max_gradient_error"] < 1e-12


@pytest.mark.gloo
def test_a_layout_that_cannot_run_is_a_row_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = str(ROOT / "configs" / "t2v_tiny.yaml"), tmp_path / "rows.json"
    heads = ["model.width=36", "model.num_heads=3", "model.rope.axes=[4,4,4]"]
    arguments = ["certify", recipe, *heads, "--layouts", "cp=2", "--json", str(file)]
    assert cli.main(arguments) == 1
    (row,) = json.loads(file.read_text())
    assert row["ok"] is False and row["max_gradient_error"] is None
    assert "2 ranks exchange heads" in row["faults"][0]
    assert "0 of 1 layouts" in capsys.readouterr().out
