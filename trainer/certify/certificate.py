"""What a certificate says, of what exactly, and whether a launch is covered by it.

A certificate is valid for one twin of a recipe, one state of the sources that decide its gradients
and one version of torch: its key is a hash of these. It holds the kinds of axes, alone and in
pairs, that were shown to train as one process does. A degree of 2 and more stands for all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import kinodit
from kinodit.trainer.certify.engines import certified_as
from kinodit.trainer.certify.layouts import KINDS, layout_name, parse_layouts, with_degrees
from kinodit.trainer.certify.run import Row
from kinodit.trainer.certify.trace import low_precision
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import RunConfig
from kinodit.trainer.parallel.mesh import ParallelConfig

FILE = "certificate.json"
"""Beside a run's recipe, in its folder."""

SOURCES = (
    "models/*.py",
    "models/diffusion/*.py",
    "models/moe/*.py",
    "trainer/parallel/*.py",
    "trainer/engine/*.py",
    "trainer/engine/*/*.py",
    "trainer/step.py",
    "trainer/balance.py",
    "trainer/ema.py",
    "trainer/optim/*.py",
)
TABLES = {"presets.py", "flops.py"}
"""Files among them that decide no gradient: the twin's config says what a preset says."""

_LATER = (("references", "absent"),)
"""Settings of tasks, and values that say nothing: older certificates stay valid for such tasks."""

Kinds = frozenset[str]


@dataclass(frozen=True)
class Certificate:
    """key: of what it is valid for; rows: what was measured.

    kinds: axes, alone and in pairs, that rows of the native engine show
    """

    key: str
    kinds: frozenset[Kinds]
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, small: Twin, rows: Sequence[Row]) -> Certificate:
        """The certificate of what these rows show."""
        plain = tuple(row.to_json() for row in rows)
        return cls(key_of(small), shown_kinds(plain), plain)

    def shown_by(self, engine: str) -> frozenset[Kinds]:
        """What rows of one engine show: each speaks for itself alone."""
        return self.kinds if engine == "native" else shown_kinds(self.rows, engine)

    def save(self, path: Path) -> None:
        """Write it to `path`, together with what one of the same key there says already."""
        known, rows = _load(path), list(self.rows)
        if known is not None and known.key == self.key:
            mine = {_case(row) for row in rows}
            rows += [row for row in known.rows if _case(row) not in mine]
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "key": self.key,
            "torch": torch.__version__.partition("+")[0],
            "kinds": sorted(sorted(kind) for kind in shown_kinds(rows)),
            "rows": rows,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def _case(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return row["layout"], row["engine"], row["dtype"], row.get("variant", "")


def shown_kinds(rows: Iterable[Mapping[str, Any]], engine: str = "native") -> frozenset[Kinds]:
    """Kinds that an engine's rows show in float64, and that none of them speaks against.

    A row that failed takes away its pair, or its axis if there is one alone, and not the parts.
    Rows of merged packs or compiled blocks take away in the same way, and show nothing alone.
    """
    passed: set[Kinds] = set()
    failed: set[Kinds] = set()
    for row in rows:
        if row["engine"] != engine:
            continue
        (layout,) = parse_layouts(row["layout"], ParallelConfig())
        kinds = set(needed_kinds(layout))
        if not row["ok"]:
            failed |= {kind for kind in kinds if len(kind) == min(2, len(axes_of(layout)))}
        elif row["dtype"] == "float64" and not row.get("variant"):
            passed |= kinds
    return frozenset(passed - failed)


def axes_of(layout: ParallelConfig) -> list[str]:
    """Kinds of axes with a degree above 1."""
    return [kind for kind in (*KINDS, "ep") if getattr(layout, kind) > 1]


def needed_kinds(layout: ParallelConfig) -> Iterator[Kinds]:
    """Every axis of the layout alone, and every pair."""
    axes = axes_of(layout)
    for count in (1, 2):
        yield from (frozenset(chosen) for chosen in itertools.combinations(axes, count))


def key_of(small: Twin) -> str:
    """SHA-256 of the twin's config, the sources and torch's version."""
    config = small.config
    parts = (config.model, config.objective, config.optim, config.remat, config.ema)
    low = low_precision(config.precision)
    digest = hashlib.sha256(torch.__version__.partition("+")[0].encode())
    plain = [_plain(part) for part in (*parts, low, *filter(None, [config.tasks]))]
    digest.update(json.dumps(plain, sort_keys=True).encode())
    root = Path(kinodit.__file__).parent
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            if path.name not in TABLES:
                digest.update(f"{pattern}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _plain(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_later(asdict(value)) for key, value in part.items()}
    return asdict(part)


def _without_later(tree: Any) -> Any:
    """Settings of tasks without those that came later, where they are as if they had not come."""
    if not isinstance(tree, dict):
        return tree
    return {key: _without_later(value) for key, value in tree.items() if (key, value) not in _LATER}


def uncertified(config: RunConfig, world_size: int) -> str:
    """The layout of this launch as `kinodit certify --layouts` takes it; "" if it is certified.

    Certificates are looked for in the run's folder and among those that come with the recipes.
    """
    replicate, shard = config.parallel.resolve(world_size)
    degrees = {"dp_replicate": replicate, "dp_shard": shard}
    layout = with_degrees(
        config.parallel,
        degrees | {name: getattr(config.parallel, name) for name in ("cp", "ring", "tp", "ep")},
    )
    needed = set(needed_kinds(layout))
    if not needed:
        return ""
    key = key_of(twin(config))
    for certificate in _certificates(config.run.folder):
        if certificate.key == key:
            needed -= certificate.shown_by(certified_as(config.engine))
    return layout_name(_smallest(layout)) if needed else ""


def _smallest(layout: ParallelConfig) -> ParallelConfig:
    """A layout of the same kinds with degrees of 2."""
    ring, ulysses = min(2, layout.ring), min(2, layout.ulysses)
    names = ("dp_replicate", "dp_shard", "tp", "ep")
    degrees = {name: min(2, getattr(layout, name)) for name in names}
    return with_degrees(layout, degrees | {"cp": ring * ulysses, "ring": ring})


def _certificates(folder: Path) -> Iterable[Certificate]:
    found = [_load(folder / FILE)]
    shipped = files("kinodit.configs") / "certificates"
    if shipped.is_dir():
        found += [
            _load(Path(str(path))) for path in shipped.iterdir() if path.name.endswith(".json")
        ]
    return [one for one in found if one is not None]


def _load(path: Path) -> Certificate | None:
    """What the file says; None if there is none, or it is not a certificate."""
    try:
        document = json.loads(path.read_text())
        kinds = frozenset(frozenset(map(str, kind)) for kind in document["kinds"])
        return Certificate(str(document["key"]), kinds, tuple(document["rows"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
