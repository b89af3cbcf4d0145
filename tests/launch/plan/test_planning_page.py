"""docs/planning.md shows what the command says today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kinodit.launch import cli
from tests.support.ranks import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "planning.md").read_text().splitlines()
    if line.startswith(("| 14b", "| 30b"))
]


def row(preset: str, num_gpus: int, folder: Path) -> list[str]:
    """The page's row of a model on so many GPUs, made anew."""
    file = folder / "plan.json"
    recipe = str(ROOT / "configs" / "t2v_2b.yaml")
    changes = [f"model.preset={preset}", f"data.samples_per_step={num_gpus}"]
    changes.append(f"data.packs_per_step={num_gpus}")
    cluster = ["--gpus", str(num_gpus), "--gpu-memory", "80"]
    assert cli.main(["plan", recipe, *changes, *cluster, "--json", str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    best = document["layouts"][0]
    names = ("dp_replicate", "dp_shard", "cp", "ring", "tp")
    layout = ",".join(f"{name}={best[name]}" for name in names if best[name] > 1)
    gib = {name: f"{size / 2**30:.1f}" for name, size in best["memory"].items()}
    return [
        preset,
        f"{num_gpus:,}",
        f"`{layout}`",
        f"{best['memory_total'] / 2**30:.1f}",
        f"{gib['gradients']}, {gib['activations']}",
        f"{best['step_s']:.1f}",
        f"{best['mfu']:.0%}",
        f"{document['num_fitting']:,}",
    ]


def test_the_page_has_every_case() -> None:
    found = [(cells[0], cells[1]) for cells in ROWS]
    assert found == [(p, g) for p in ("14b", "30b") for g in ("64", "512", "4,096")]


@pytest.mark.slow
def test_a_row_is_what_the_command_says(tmp_path: Path) -> None:
    assert row("30b", 64, tmp_path) == ROWS[3]


@pytest.mark.slow
@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: "-".join(cells[:2]))
def test_every_row_is_what_the_command_says(cells: list[str], tmp_path: Path) -> None:
    assert row(cells[0], int(cells[1].replace(",", "")), tmp_path) == cells


EXPERTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "experts.md").read_text().splitlines()
    if line.startswith(("| 256 |", "| 1,024 |"))
]


@pytest.mark.slow
@pytest.mark.parametrize("num_gpus", ["256", "1,024"])
def test_the_large_recipe_with_experts_is_planned_as_its_page_says(
    num_gpus: str, tmp_path: Path
) -> None:
    """The fastest layout, and the fastest whose experts are dealt out within a node."""
    file = tmp_path / "plan.json"
    recipe = str(ROOT / "configs" / "t2v_moe_large.yaml")
    cluster = ["--gpus", num_gpus.replace(",", ""), "--gpu-memory", "80", "--top", "1000"]
    assert cli.main(["plan", recipe, *cluster, "--json", str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    layouts = document["layouts"]
    dealt = next(one for one in layouts if one["ep"] == 8)
    names = ("dp_replicate", "dp_shard", "cp", "ring", "tp", "ep")
    found = [
        [
            num_gpus,
            f"`{','.join(f'{name}={one[name]}' for name in names if one[name] > 1)}`",
            f"{one['memory_total'] / 2**30:.1f}",
            f"{one['step_s']:.3g}",
            f"{one['mfu']:.0%}",
        ]
        for one in (layouts[0], dealt)
    ]
    rows = [cells for cells in EXPERTS if cells[0] == num_gpus]
    assert [cells[:5] for cells in rows] == found
    assert rows[0][5] == f"{document['num_fitting']:,}"
