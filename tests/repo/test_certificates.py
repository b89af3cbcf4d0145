"""Certificates that come with the recipes belong to the present sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.trainer.certify.certificate import key_of
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from tests.support.ranks import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_its_certificate(recipe: Path) -> None:
    config = load_config(recipe)
    document = json.loads((ROOT / "configs" / "certificates" / f"{recipe.stem}.json").read_text())
    assert document["keys"]["native"] == key_of(twin(config)), (
        f"the certificate of {recipe.name} belongs to other sources: run `make certificates`"
    )
    assert all(row["ok"] for row in document["rows"])
    kinds = {frozenset(kind) for kind in document["kinds"]}
    axes = ["dp_replicate", "dp_shard", "ulysses", "ring", "tp"]
    if config.model.experts:
        axes.append("ep")
    assert kinds == {frozenset((one, other)) for one in axes for other in axes}
