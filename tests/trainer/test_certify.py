"""The certificate's parts: twins keep the structure, layouts have names, differences have words."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kinodit.data.synthetic import synthetic_pack
from kinodit.launch import cli
from kinodit.launch.commands import certify as command
from kinodit.models.attention import fits_flash
from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.models.rope import RopeConfig
from kinodit.trainer.certify import StepOutcome, compare
from kinodit.trainer.certify.certificate import (
    FILE,
    Certificate,
    axes_of,
    key_of,
    uncertified,
)
from kinodit.trainer.certify.layouts import (
    KINDS,
    default_layouts,
    full_layouts,
    layout_name,
    lowest,
    num_ranks,
    parse_layouts,
)
from kinodit.trainer.certify.modules import sum_of_squares
from kinodit.trainer.certify.ranks import MAX_THREADS
from kinodit.trainer.certify.run import Case, Row, Variant
from kinodit.trainer.certify.trace import SLOTS_OF_PACKS, low_precision
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import Verdict
from kinodit.trainer.config import RunConfig, load_config
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.run import certificate_warning
from tests.support.ranks import ROOT, Ranks

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
    assert sum(p.numel() for p in ours.parameters()) < 700_000
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


@pytest.mark.parametrize("axes", [(), (0, 16, 16), (8, 12, 12), (32, 0, 0)])
def test_a_twin_has_heads_that_every_kernel_takes(axes: tuple[int, ...]) -> None:
    model = replace(PRESETS["tiny"], width=128, num_heads=4, rope=RopeConfig(axes=axes))
    small = twin_of(model).config.model
    assert fits_flash(torch.bfloat16, small.dim_of_head)
    split = small.rope.split(small.dim_of_head)
    assert sum(split) == small.dim_of_head
    assert [bool(dim) for dim in split] == [bool(dim) for dim in model.rope.split(32)]


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
    one_head = replace(four_heads, num_heads=1, width=16)
    assert [layout_name(x) for x in default_layouts(one_head, BASE, 2)] == [
        "dp_replicate=2",
        "dp_shard=2",
        "cp=2,ring=2",
    ]


def test_the_full_grid_adds_every_triple() -> None:
    model = twin_of(PRESETS["2b"]).config.model
    upto8 = full_layouts(model, BASE, 8)
    assert upto8[:20] == default_layouts(model, BASE, 8)
    triples = [layout_name(layout) for layout in upto8[20:]]
    assert len(set(triples)) == len(list(itertools.combinations(KINDS, 3))) == 10
    assert "dp_shard=2,cp=2,tp=2" in triples and "cp=4,ring=2,tp=2" in triples
    assert all(num_ranks(layout) == 8 for layout in upto8[20:])
    assert all(len(axes_of(layout)) == 3 for layout in upto8[20:])
    assert full_layouts(model, BASE, 4) == default_layouts(model, BASE, 4)
    low = [layout_name(layout) for layout in lowest(upto8)]
    assert len(low) == 25 and "cp=4,ring=2" in low
    assert not {"cp=4", "cp=4,ring=4", "tp=4", "dp_shard=4", "dp_replicate=4"} & set(low)
    assert lowest(upto8[5:7]) == upto8[5:7]


def test_the_command_takes_the_size_of_the_grid(capsys: pytest.CaptureFixture[str]) -> None:
    def asked(*arguments: str) -> list[str]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        recipe = str(ROOT / "configs" / "t2v_tiny.yaml")
        args = parser.parse_args([recipe, *arguments])
        small = twin(load_config(args.config, args.overrides))
        return [layout_name(layout) for layout in command.chosen_layouts(args, small)]

    assert len(asked()) == 20 and len(asked("--size", "full")) == 30
    assert asked("--size", "full", "--world", "4") == asked()
    assert asked("--world", "2") == [
        "dp_replicate=2",
        "dp_shard=2",
        "cp=2",
        "cp=2,ring=2",
        "tp=2",
    ]
    with pytest.raises(ConfigError, match="--world 1: the smallest layout"):
        asked("--world", "1")
    # Whatever else the recipe says of parallelism stays as it is.
    kept = default_layouts(PRESETS["tiny"], ParallelConfig(prefetch=3), 4)
    assert all(layout.prefetch == 3 for layout in kept)


def test_the_grid_merges_packs_and_compiles_where_asked() -> None:
    recipe = str(ROOT / "configs" / "t2v_tiny.yaml")
    small = twin(load_config(Path(recipe)))

    def asked(*arguments: str) -> list[tuple[str, str, str]]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        args = parser.parse_args([recipe, "--engines", "native", *arguments])
        cases = command.cases_of(args, command.chosen_layouts(args, small), small.config)
        return [(layout_name(one.layout), one.dtype, one.variant) for one in cases if one.variant]

    axes = ["dp_replicate=2", "dp_shard=2", "cp=2", "cp=2,ring=2", "tp=2"]
    assert asked() == [(layout, "float64", "merged") for layout in axes]
    assert asked("--layouts", "tp=2") == []
    assert asked("--layouts", "tp=2;cp=4", "--compile") == [
        ("tp=2", "float64", "compiled"),
        ("cp=4", "float64", "compiled"),
    ]
    assert asked("--layouts", "tp=2", "--compile", "--device", "cuda")[0][1] == "bfloat16"
    merged, compiled = (
        Case(ParallelConfig(tp=2), variant=variant).engine_config
        for variant in ("merged", "compiled")
    )
    assert (merged.micro_batches, merged.compile) == (1, False)
    assert (compiled.micro_batches, compiled.compile) == (0, True)


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


def row(layout: str, ok: bool = True, dtype: str = "float64", variant: Variant = "") -> Row:
    faults = () if ok else ("off",)
    return Row(layout, dtype, 2, Verdict(0, 0, 0, 0, 0, faults), faults, variant=variant)


def test_a_certificate_covers_axes_and_their_pairs(tmp_path: Path) -> None:
    overrides = [f"run.out_dir={tmp_path}", "parallel.tp=4", "parallel.cp=4", "parallel.ring=4"]
    # A variant of the recipe: it came with a certificate itself.
    overrides.append("model.sandwich_norm=true")
    config = load_config(ROOT / "configs" / "t2v_tiny.yaml", overrides)
    small = twin(config)
    wanted = "dp_shard=2,cp=2,ring=2,tp=2"
    assert uncertified(config, 64) == wanted
    pairs = ["dp_shard=2,tp=2", "dp_shard=2,cp=2,ring=2"]
    path = config.run.folder / FILE
    Certificate.of(small, [row(pair) for pair in pairs]).save(path)
    assert uncertified(config, 64) == wanted
    # A later one adds to it; a row that failed takes its pair away, not its axes.
    Certificate.of(small, [row("cp=2,ring=2,tp=2", ok=False)]).save(path)
    assert uncertified(config, 64) == wanted
    Certificate.of(small, [row("cp=2,ring=2,tp=2"), row("tp=2", dtype="bfloat16")]).save(path)
    assert uncertified(config, 64) == ""
    assert uncertified(replace(config, parallel=ParallelConfig(cp=2)), 2) == "cp=2"
    dealt = replace(config, parallel=ParallelConfig(dp_shard=4, ep=4))
    assert uncertified(dealt, 4) == "dp_shard=2,ep=2"
    other = replace(config, model=replace(config.model, qk_norm="none"))
    assert uncertified(other, 64) == wanted
    path.write_text("no certificate")
    assert uncertified(config, 64) == wanted
    assert uncertified(replace(config, parallel=ParallelConfig()), 1) == ""


def test_a_row_that_is_run_again_speaks_for_itself(tmp_path: Path) -> None:
    small, path = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")), tmp_path / FILE
    for ok, kinds in ((True, [["tp"]]), (False, []), (True, [["tp"]])):
        Certificate.of(small, [row("tp=2", ok)]).save(path)
        assert json.loads(path.read_text())["kinds"] == kinds
    Certificate.of(small, [row("tp=2", ok=False, dtype="bfloat16")]).save(path)
    document = json.loads(path.read_text())
    assert document["kinds"] == [] and len(document["rows"]) == 2


def test_rows_of_variants_take_away_and_show_nothing_alone(tmp_path: Path) -> None:
    small, path = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")), tmp_path / FILE

    def kinds(*rows: Row) -> list[list[str]]:
        Certificate.of(small, rows).save(path)
        found: list[list[str]] = json.loads(path.read_text())["kinds"]
        return found

    assert kinds(row("tp=2", variant="merged"), row("tp=2", variant="compiled")) == []
    assert kinds(row("tp=2")) == [["tp"]]
    assert kinds(row("tp=2", ok=False, variant="compiled")) == []
    assert len(json.loads(path.read_text())["rows"]) == 3


@pytest.mark.parametrize("required", [False, True])
def test_a_launch_without_a_certificate_names_the_command(tmp_path: Path, required: bool) -> None:
    overrides = [f"run.out_dir={tmp_path}", "parallel.tp=2", "model.qk_norm=none"]
    overrides.append(f"run.require_certificate={str(required).lower()}")
    config = load_config(ROOT / "configs" / "t2v_tiny.yaml", overrides)
    wanted = f'kinodit certify {config.run.folder / "config.yaml"} --layouts "dp_shard=2,tp=2"'
    if required:
        with pytest.raises(ConfigError) as error:
            certificate_warning(config, 4)
        said = str(error.value)
    else:
        said = certificate_warning(config, 4)
    assert wanted in said
    rows = [row("dp_shard=2,tp=2")]
    Certificate.of(twin(config), rows).save(config.run.folder / FILE)
    assert certificate_warning(config, 4) == ""


def test_the_key_knows_in_which_format_gradients_are_summed() -> None:
    base = load_config(ROOT / "configs" / "t2v_tiny.yaml")

    def key(**changes: str) -> str:
        precision = replace(base.precision, **changes)  # type: ignore[arg-type]
        return key_of(twin(replace(base, precision=precision)))

    assert key() == key(compute="bfloat16") != key(reduce="bfloat16")
    assert low_precision(PrecisionConfig(reduce="bfloat16")).reduce_dtype == torch.bfloat16
    for plain in (PrecisionConfig(), PrecisionConfig("float64", "float64", "float64")):
        assert low_precision(plain) == PrecisionConfig("float32", "bfloat16", "float32")


def test_widths_and_data_do_not_change_the_key_and_kinds_of_parts_do() -> None:
    base = load_config(ROOT / "configs" / "t2v_tiny.yaml")
    key = key_of(twin(base))
    wide = replace(base, model=replace(base.model, width=256, num_heads=8, head_dim=32))
    assert key_of(twin(replace(wide, run=replace(base.run, seed=7)))) == key
    for change in ({"activation": "swiglu"}, {"qk_norm": "none"}, {"num_single_blocks": 1}):
        other = replace(base, model=replace(base.model, **change))
        assert key_of(twin(other)) != key


def linear_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return one, copy.deepcopy(one)


def test_any_two_modules_are_compared() -> None:
    one, other = linear_pair()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert compare(one, other, [x]).ok
    with torch.no_grad():
        other[2].bias.add_(1e-6)  # type: ignore[index]
    verdict = compare(one, other, [x])
    assert not verdict.ok and verdict.max_gradient_error > 1e-8
    assert compare(one, other, [x], tolerance=1e-3).ok
    with pytest.raises(ConfigError, match=r"8 gradients are on one side only, .* '0.0.bias'"):
        compare(one, nn.Sequential(nn.Sequential(one[0], one[1]), one[2]), [x])  # type: ignore[index]


def test_any_two_steps_are_compared() -> None:
    one, _ = linear_pair()

    def step(scale: float) -> Callable[[Tensor], StepOutcome]:
        def run(x: Tensor) -> StepOutcome:
            loss = one(x).square().sum()
            gradients = torch.autograd.grad(loss, list(one.parameters()))
            names = [name for name, _ in one.named_parameters()]
            found = {name: scale * g for name, g in zip(names, gradients, strict=True)}
            return StepOutcome(float(loss.detach()), found)

        return run

    x = torch.randn(5, 3, dtype=torch.float64)
    assert compare(step(1.0), step(1.0), [x]).ok
    verdict = compare(step(1.0), step(0.5), [x])
    assert verdict.loss_error == 0 and verdict.max_gradient_error == pytest.approx(0.5)


def test_outputs_in_another_order_are_not_the_same() -> None:
    x = torch.randn(4, 3)
    assert sum_of_squares(x) != sum_of_squares(x.flip(0))
    assert sum_of_squares((x, {"a": x})) == pytest.approx(2 * float(sum_of_squares(x)))


@pytest.mark.gloo
def test_the_command_prints_rows_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = str(ROOT / "configs" / "t2v_tiny.yaml"), tmp_path / "rows.json"
    layouts = "cp=2,ring=2;dp_shard=2"
    out = f"run.out_dir={tmp_path}"
    code = cli.main(["certify", recipe, out, "--layouts", layouts, "--json", str(file)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "width 128 -> 64" in printed
    assert "4 of 4 agree with one process" in printed
    rows = json.loads(file.read_text())
    assert [row["layout"] for row in rows] == 2 * layouts.split(";")
    assert [row["dtype"] for row in rows] == 2 * ["float64"] + 2 * ["bfloat16"]
    assert all(row["ok"] is True for row in rows)
    for exact in rows[:2]:
        assert 0 < exact["max_gradient_error"] < 1e-12
    for rounded in rows[2:]:
        assert rounded["max_gradient_error"] > 1e-6 and 0 < rounded["noise_ratio"] < 4
    (certificate,) = tmp_path.glob("*/certificate.json")
    kinds = json.loads(certificate.read_text())["kinds"]
    assert kinds == [["dp_shard"], ["ring"]]


@pytest.mark.gloo
def test_a_layout_that_cannot_run_is_a_row_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = str(ROOT / "configs" / "t2v_tiny.yaml"), tmp_path / "rows.json"
    heads = ["model.width=36", "model.num_heads=3", "model.rope.axes=[4,4,4]"]
    heads.append(f"run.out_dir={tmp_path}")
    arguments = ["certify", recipe, *heads, "--layouts", "cp=2", "--json", str(file)]
    assert cli.main(arguments) == 1
    first, second = json.loads(file.read_text())
    assert first["ok"] is second["ok"] is False and first["max_gradient_error"] is None
    assert "2 ranks exchange heads" in first["faults"][0]
    assert "0 of 2 agree" in capsys.readouterr().out
    (certificate,) = tmp_path.glob("*/certificate.json")
    assert json.loads(certificate.read_text())["kinds"] == []


def pid_and_threads(rank: int, world_size: int) -> tuple[int, int]:
    build_mesh(ParallelConfig(dp_shard=1, tp=2), world_size, rank, torch.device("cpu"))
    return os.getpid(), len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.gloo
def test_processes_are_started_anew_before_groups_of_earlier_cases_fill_them() -> None:
    group = Ranks(2)
    try:
        found = [group.run(pid_and_threads)[0] for _ in range(12)]
    finally:
        group.close()
    pids = [pid for pid, _ in found]
    assert 1 < len(set(pids)) < 12 and pids == sorted(pids, key=pids.index)
    growth = found[1][1] - found[0][1]
    assert growth > 0 and max(threads for _, threads in found) <= MAX_THREADS + growth


def test_devices_that_are_not_there_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs" / "t2v_tiny.yaml")
    code = cli.main(["certify", recipe, "--device", "cuda", "--layouts", "tp=999"])
    assert code == 2
    assert "the layouts need 999 devices" in capsys.readouterr().err
