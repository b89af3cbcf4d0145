"""What a certificate says, of what exactly, and whether a launch is covered by it.

Rows of an engine are valid for one twin of a recipe, one state of the sources that decide its
gradients and one version of torch: their key is a hash of these. Sources that drive one library
alone are in the keys of engines that run it. A certificate holds the kinds of axes, alone and in
pairs, that were shown to train as one process does. A degree of 2 and more stands for all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import kinodit
from kinodit.trainer.certify.engines import ENGINES, certified_as, libraries_of
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
TABLES = {"models/presets.py", "models/flops.py", "trainer/engine/refusals.py"}
"""Files among them that decide no gradient: the twin's config says what a preset says."""

OF_LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "deepspeed": (
        "trainer/engine/deepspeed/*.py",
        "trainer/engine/zero_config.py",
        "trainer/engine/partitioned.py",
        "trainer/engine/config.py",
    ),
    "megatron": (
        "trainer/engine/megatron/*.py",
        "trainer/engine/partitioned.py",
        "trainer/engine/config.py",
    ),
}
"""Sources that decide gradients only where a library is driven."""

_LATER = (("references", "absent"),)
"""Settings of tasks, and values that say nothing: older certificates stay valid for such tasks."""

Kinds = frozenset[str]


@dataclass(frozen=True)
class Certificate:
    """keys: what rows of an engine are valid for, by its name; rows: what was measured."""

    keys: Mapping[str, str]
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, small: Twin, rows: Sequence[Row]) -> Certificate:
        """The certificate of what these rows show."""
        keys = {engine: key_of(small, engine) for engine in ENGINES}
        return cls(keys, tuple(row.to_json() for row in rows))

    def save(self, path: Path) -> None:
        """Write it to `path`, together with rows there that are of the same keys."""
        rows = list(self.rows)
        if (known := _load(path)) is not None:
            mine = {_case(row) for row in rows}
            for row in known.rows:
                valid = known.keys[row["engine"]] == self.keys.get(row["engine"])
                if valid and _case(row) not in mine:
                    rows.append(row)
        engines = sorted({"native", *(row["engine"] for row in rows)})
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "keys": {engine: self.keys[engine] for engine in engines},
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


def key_of(small: Twin, engine: str = "native") -> str:
    """SHA-256 of the twin's config, the sources behind an engine's rows and torch's version."""
    config = small.config
    parts = (config.model, config.objective, config.optim, config.remat, config.ema)
    low = low_precision(config.precision)
    digest = hashlib.sha256(torch.__version__.partition("+")[0].encode())
    plain = [_plain(part) for part in (*parts, low, *filter(None, [config.tasks]))]
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, path in sources(libraries_of(engine)):
        digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def sources(libraries: Collection[str] = tuple(OF_LIBRARIES)) -> Iterator[tuple[str, Path]]:
    """(name, file) of what decides gradients where these libraries are driven, in one order."""
    root = Path(kinodit.__file__).parent
    of_library: dict[str, set[str]] = {}
    for library, patterns in OF_LIBRARIES.items():
        for pattern in patterns:
            for path in root.glob(pattern):
                of_library.setdefault(path.relative_to(root).as_posix(), set()).add(library)
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            wanted = of_library.get(name)
            if name not in TABLES and (wanted is None or wanted & set(libraries)):
                yield name, path


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
    engine = certified_as(config.engine)
    key = key_of(twin(config), engine)
    for certificate in _certificates(config.run.folder):
        if certificate.keys.get(engine) == key:
            needed -= shown_kinds(certificate.rows, engine)
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
        keys = {str(engine): str(key) for engine, key in document["keys"].items()}
        rows = tuple(document["rows"])
        return Certificate(keys, rows) if {row["engine"] for row in rows} <= keys.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
