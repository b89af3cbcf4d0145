"""Figures of long runs, kept with what they belong to."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from kinodit.trainer.config import (
    MAY_CHANGE_ON_RESUME,
    config_to_dict,
    flatten,
    load_config,
)
from tests.support.ranks import ROOT

EVIDENCE = ROOT / "docs" / "evidence"


def recipe_of(recipe: str) -> dict[str, Any]:
    """What decides the figures.

    Of a recipe: every key, with the defaults that it leans on, but those that leave the loss curve
    as it is. Of a test that builds its own model: the SHA-256 of its file.
    """
    if recipe.endswith(".py"):
        return {"sha256": hashlib.sha256((ROOT / recipe).read_bytes()).hexdigest()}
    keys = flatten(config_to_dict(load_config(ROOT / recipe)))
    decisive = {k: v for k, v in keys.items() if not k.startswith(MAY_CHANGE_ON_RESUME)}
    return dict(json.loads(json.dumps(decisive)))


def changed_keys(recipe: str, measured: dict[str, Any]) -> list[str]:
    """Keys that are not what they were when the figures were `measured`.

    A key that there was not then counts if the recipe sets it itself: what has come since leaves a
    recipe that does not ask for it as it was.
    """
    now = recipe_of(recipe)
    own = {} if recipe.endswith(".py") else flatten(yaml.safe_load((ROOT / recipe).read_text()))
    changed = [
        key
        for key, value in measured.items()
        if now.get(key, MISSING) != value and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    return changed + [key for key in now if key not in measured and key in own]


MISSING = object()


def write_evidence(name: str, recipe: str, figures: dict[str, Any]) -> Path:
    """Write docs/evidence/NAME.json with what decided them and the commit that it ran at."""
    document = {
        "recipe": recipe,
        "measured_with": recipe_of(recipe),
        "commit": _commit(),
        "figures": figures,
    }
    path = EVIDENCE / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def add_evidence(name: str, recipe: str, part: str, figures: dict[str, Any]) -> Path:
    """Write figures of one part beside those that other parts wrote at this commit."""
    path = EVIDENCE / f"{name}.json"
    parts: dict[str, Any] = {}
    if path.exists():
        before = json.loads(path.read_text())
        if (before["commit"], before["measured_with"]) == (_commit(), recipe_of(recipe)):
            parts = before["figures"]
    return write_evidence(name, recipe, dict(sorted({**parts, part: figures}.items())))


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
