"""Layouts to certify: their names, the default grid, and which of them a model can have at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from kinodit.models.config import MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.table import assign_splits, check_heads, mmdit_table

DEGREES = ("dp_replicate", "dp_shard", "cp", "ring", "tp", "ep")
"""The axes of the mesh, as they are called in a recipe."""
ALONE = "1"
"""The layout of one process."""


def layout_name(layout: ParallelConfig) -> str:
    """For instance "dp_shard=2,cp=2": the degrees above 1."""
    degrees = {name: getattr(layout, name) for name in DEGREES}
    return ",".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1) or ALONE


def num_ranks(layout: ParallelConfig) -> int:
    """Processes of a layout whose dp_shard is given."""
    return layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp


def parse_layouts(text: str, base: ParallelConfig) -> list[ParallelConfig]:
    """Layouts from "1;cp=2;dp_shard=2,cp=2"; what is not named is 1, other settings are `base`'s.

    Raises:
        ConfigError: an axis that does not exist, a degree that is no number, no layout at all.
    """
    layouts = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        degrees = {}
        for item in part.split(",") if part != ALONE else ():
            name, _, value = item.partition("=")
            if name.strip() not in DEGREES:
                raise ConfigError(f"layout {part!r}: there is no axis {name.strip()!r}; {DEGREES}")
            if not value.strip().isdecimal():
                raise ConfigError(f"layout {part!r}: {name.strip()} needs a number, as in cp=2")
            degrees[name.strip()] = int(value)
        layouts.append(with_degrees(base, degrees))
    if not layouts:
        raise ConfigError(f"--layouts {text!r} names no layout; for instance cp=2;dp_shard=2,cp=2")
    return layouts


def default_layouts(model: MMDiTConfig, base: ParallelConfig, world: int) -> list[ParallelConfig]:
    """Every axis alone at 2 and 4, and every pair at 2 x 2, on at most `world` ranks.

    Layouts that the model cannot have are left out. Degree 2 and more of an axis stand for all: a
    wrong group, count or index shows at 2 already, or at 4 where a degree is odd to its data.
    """
    candidates = [layout for layout in _grid(base) if 1 < num_ranks(layout) <= world]
    return _fitting(model, candidates)


def full_layouts(model: MMDiTConfig, base: ParallelConfig, world: int) -> list[ParallelConfig]:
    """The default ones, and every triple of axes at 2 x 2 x 2, on at most `world` ranks."""
    triples = [_all_at_two(base, kinds) for kinds in itertools.combinations(KINDS, 3)]
    candidates = [layout for layout in triples if num_ranks(layout) <= world]
    return default_layouts(model, base, world) + _fitting(model, candidates)


KINDS = ("dp_replicate", "dp_shard", "ulysses", "ring", "tp")
"""Kinds of axes: cp is two, as it exchanges heads or goes round a ring."""


def lowest(layouts: Sequence[ParallelConfig]) -> list[ParallelConfig]:
    """Those with no kind of axis above 2; all of them if there are none such."""
    low = [one for one in layouts if max(getattr(one, kind) for kind in (*KINDS, "ep")) <= 2]
    return low or list(layouts)


def _grid(base: ParallelConfig) -> Iterator[ParallelConfig]:
    for degree in (2, 4):
        for kind in KINDS:
            # A ring is a way to spend cp, so its degree counts in cp too.
            axes = {"ulysses": ("cp",), "ring": ("cp", "ring")}.get(kind, (kind,))
            yield with_degrees(base, dict.fromkeys(axes, degree))
    for pair in itertools.combinations(KINDS, 2):
        yield _all_at_two(base, pair)
    for degrees in WITH_EXPERTS:
        yield with_degrees(base, degrees)


WITH_EXPERTS: tuple[dict[str, int], ...] = (
    {"dp_shard": 2, "ep": 2},
    {"dp_shard": 4, "ep": 4},
    {"dp_shard": 4, "ep": 2},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    {"cp": 2, "ep": 2},
    {"cp": 2, "ring": 2, "ep": 2},
    {"cp": 2, "dp_shard": 2, "ep": 4},
    {"cp": 2, "tp": 2, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 2},
)
"""Layouts that deal experts out: ep is not an axis beside the others, but overlaps two of them."""


def _all_at_two(base: ParallelConfig, kinds: Sequence[str]) -> ParallelConfig:
    degrees = {kind: 2 for kind in kinds if kind in DEGREES}
    shared = sum(kind in ("ulysses", "ring") for kind in kinds)
    return with_degrees(base, {**degrees, "cp": 2**shared})


def with_degrees(base: ParallelConfig, degrees: Mapping[str, int]) -> ParallelConfig:
    """`base` with these degrees, and 1 for the others."""
    return replace(base, **{**dict.fromkeys(DEGREES, 1), **degrees})  # type: ignore[arg-type]


def _fitting(model: MMDiTConfig, layouts: Sequence[ParallelConfig]) -> list[ParallelConfig]:
    with torch.device("meta"):
        unmade = MMDiT(model)
    return [layout for layout in layouts if _fits(model, unmade, layout)]


def _fits(model: MMDiTConfig, unmade: MMDiT, layout: ParallelConfig) -> bool:
    counts = [experts.num_experts for experts in model.experts.values()]
    if layout.ep > 1 and (not counts or any(count % layout.ep for count in counts)):
        return False
    if layout.cp * layout.tp == 1:
        return True
    try:
        check_heads(model, layout.tp, layout.ulysses)
        assign_splits(unmade, mmdit_table(model), layout.tp)
    except ConfigError:
        return False
    return True
