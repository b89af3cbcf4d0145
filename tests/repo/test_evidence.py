"""Kept figures belong to the present recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.evidence import EVIDENCE, recipe_hash

FILES = sorted(EVIDENCE.glob("*.json"))
CLAIMED = {"certificates", "direction", "floor", "kill_points", "mutants", "replay"}
"""What the documentation says was measured."""


def test_every_claim_has_its_figures() -> None:
    assert {path.stem for path in FILES} >= CLAIMED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_figures_belong_to_the_present_recipe(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["recipe_sha256"] == recipe_hash(document["recipe"]), (
        f"{path.name} was measured with another {document['recipe']}: run `make proof`"
    )
    assert len(document["commit"]) == 40
    assert document["figures"]
