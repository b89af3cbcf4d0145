"""Figures of long runs, kept with what they belong to."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from kinodit.trainer.config import (
    MAY_CHANGE_ON_RESUME,
    config_to_dict,
    flatten,
    load_config,
)
from tests.support.ranks import ROOT

EVIDENCE = ROOT / "docs" / "evidence"


def recipe_hash(recipe: str) -> str:
    """SHA-256 of what decides the figures.

    Of a recipe: every key, with the defaults that it leans on, but those that leave the loss curve
    as it is. Of a test that builds its own model: its file.
    """
    if recipe.endswith(".py"):
        return hashlib.sha256((ROOT / recipe).read_bytes()).hexdigest()
    keys = flatten(config_to_dict(load_config(ROOT / recipe)))
    decisive = {k: v for k, v in keys.items() if not k.startswith(MAY_CHANGE_ON_RESUME)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def write_evidence(name: str, recipe: str, figures: dict[str, Any]) -> Path:
    """Write docs/evidence/NAME.json with the recipe's hash and the commit that it ran at."""
    document = {
        "recipe": recipe,
        "recipe_sha256": recipe_hash(recipe),
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
        if (before["commit"], before["recipe_sha256"]) == (_commit(), recipe_hash(recipe)):
            parts = before["figures"]
    return write_evidence(name, recipe, dict(sorted({**parts, part: figures}.items())))


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
