"""Layouts to certify: their names, the default grid, and which of them a model can have at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.trainer.parallel.context import check_context
from kinodit.trainer.parallel.mesh import ParallelConfig

DEGREES = ("dp_replicate", "dp_shard", "cp", "ring")
"""The axes of the mesh, as they are called in a recipe."""


def layout_name(layout: ParallelConfig) -> str:
    """For instance "dp_shard=2,cp=2": the degrees above 1."""
    degrees = {name: getattr(layout, name) for name in DEGREES}
    return ",".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1) or "1"


def num_ranks(layout: ParallelConfig) -> int:
    """Processes of a layout whose dp_shard is given."""
    return layout.dp_replicate * layout.dp_shard * layout.cp


def parse_layouts(text: str, base: ParallelConfig) -> list[ParallelConfig]:
    """Layouts from "cp=2;dp_shard=2,cp=2"; what is not named is 1, other settings are `base`'s.

    Raises:
        ConfigError: an axis that does not exist, a degree that is no number, no layout at all.
    """
    layouts = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        degrees = {}
        for item in part.split(","):
            name, _, value = item.partition("=")
            if name.strip() not in DEGREES:
                raise ConfigError(f"layout {part!r}: there is no axis {name.strip()!r}; {DEGREES}")
            if not value.strip().isdecimal():
                raise ConfigError(f"layout {part!r}: {name.strip()} needs a number, as in cp=2")
            degrees[name.strip()] = int(value)
        layouts.append(_with_degrees(base, degrees))
    if not layouts:
        raise ConfigError(f"--layouts {text!r} names no layout; for instance cp=2;dp_shard=2,cp=2")
    return layouts


def default_layouts(model: MMDiTConfig, base: ParallelConfig, world: int) -> list[ParallelConfig]:
    """Every axis alone at 2 and 4, and every pair at 2 x 2, on at most `world` ranks.

    Layouts that the model cannot have are left out. Degree 2 and more of an axis stand for all: a
    wrong group, count or index shows at 2 already, or at 4 where a degree is odd to its data.
    """
    return [
        layout for layout in _grid(base) if 1 < num_ranks(layout) <= world and _fits(model, layout)
    ]


def _grid(base: ParallelConfig) -> Iterator[ParallelConfig]:
    # A ring is a way to spend cp, so its degree counts in cp too.
    axes = [{"dp_replicate": 1}, {"dp_shard": 1}, {"cp": 1}, {"cp": 1, "ring": 1}]
    for degree in (2, 4):
        for axis in axes:
            yield _with_degrees(base, dict.fromkeys(axis, degree))
    for first, second in itertools.combinations(axes, 2):
        if "ring" in second and "cp" in first:
            yield _with_degrees(base, {"cp": 4, "ring": 2})
        else:
            yield _with_degrees(base, dict.fromkeys((*first, *second), 2))


def _with_degrees(base: ParallelConfig, degrees: dict[str, int]) -> ParallelConfig:
    return replace(
        base,
        dp_replicate=degrees.get("dp_replicate", 1),
        dp_shard=degrees.get("dp_shard", 1),
        cp=degrees.get("cp", 1),
        ring=degrees.get("ring", 1),
    )


def _fits(model: MMDiTConfig, layout: ParallelConfig) -> bool:
    if layout.cp == 1:
        return True
    try:
        check_context(model, layout.ulysses)
    except ConfigError:
        return False
    return True
