"""Kept figures belong to the present recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.evidence import EVIDENCE, changed_keys, recipe_of

FILES = sorted(EVIDENCE.glob("*.json"))
CLAIMED = {
    "bounce",
    "certificates",
    "checksum_quiet1c",
    "checksum_quiet2r",
    "checksum_quiet2t",
    "consumed_budget",
    "consumed_count",
    "direction",
    "experts",
    "fill",
    "floor",
    "hangs",
    "fuzz",
    "kill_points",
    "mutants",
    "naming",
    "pair",
    "replay",
    "restarts",
    "soak",
}
"""What the documentation says was measured."""


def test_every_claim_has_its_figures() -> None:
    assert {path.stem for path in FILES} >= CLAIMED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_figures_belong_to_the_present_recipe(path: Path) -> None:
    document = json.loads(path.read_text())
    changed = changed_keys(document["recipe"], document["measured_with"])
    assert not changed, (
        f"{path.name} was measured with another {document['recipe']} ({', '.join(changed)}): "
        "run `make proof`"
    )
    assert len(document["commit"]) == 40
    assert document["figures"]


def test_a_changed_key_is_found_and_a_new_default_is_none() -> None:
    recipe = "configs/t2v_tiny.yaml"
    now = recipe_of(recipe)
    assert not changed_keys(recipe, now)
    assert changed_keys(recipe, {**now, "optim.lr": 1.0}) == ["optim.lr"]
    assert changed_keys(recipe, {**now, "gone": 1}) == ["gone"]
    older = {key: value for key, value in now.items() if key not in {"optim.eps", "optim.lr"}}
    assert changed_keys(recipe, older) == ["optim.lr"]
