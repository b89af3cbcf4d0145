"""How evenly the experts of a run were used, as maps that a page can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kinodit.launch.report.read import Row, number


@dataclass(frozen=True)
class Cell:
    """One expert and some of the tokens. load: over the mean; None if nothing went there.

    shade: per cent of full colour, 0 for no load and 100 for twice the mean or more
    """

    load: float | None
    shade: int


@dataclass(frozen=True)
class ExpertMap:
    """One layer. said: figures of it; rows: (label of some tokens, each expert's load).

    Groups of rows: all tokens, those of each modality, those of each range of the noise level.
    """

    name: str
    said: list[str]
    groups: list[list[tuple[str, list[Cell]]]]


def expert_maps(rows: Sequence[Row]) -> list[ExpertMap]:
    """The layers with experts, as of the last row that tells of them; rows may hold anything."""
    last = next((row["experts"] for row in reversed(rows) if row.get("experts")), None)
    if not isinstance(last, dict):
        return []
    return [_map(str(name), layer) for name, layer in last.items() if isinstance(layer, dict)]


def _map(name: str, layer: Row) -> ExpertMap:
    bins, modalities = layer.get("noise_bins"), layer.get("modalities")
    rows = [_cells(line) for line in bins] if isinstance(bins, list) else []
    labels = [f"t {i / len(rows):.1f}–{(i + 1) / len(rows):.1f}" for i in range(len(rows))]
    by_stream = modalities.items() if isinstance(modalities, dict) else ()
    groups = [
        [("all tokens", _cells(layer.get("load")))],
        [(str(stream), _cells(line)) for stream, line in by_stream],
        list(zip(labels, rows, strict=True)),
    ]
    seen = [[(label, cells) for label, cells in group if cells] for group in groups]
    return ExpertMap(_title(name), _said(layer), [group for group in seen if group])


def _said(layer: Row) -> list[str]:
    violation, dropped = number(layer.get("violation")), number(layer.get("dropped"))
    norm = number(layer.get("router_grad_norm"))
    said = [f"largest load {1 + violation:.2f}" if math.isfinite(violation) else ""]
    said.append(f"{100 * dropped:.1f} % dropped" if dropped > 0 else "")
    said.append(f"router gradient {norm:.2g}" if math.isfinite(norm) else "")
    return [part for part in said if part]


def _title(name: str) -> str:
    """For instance `video, joint block 2`, from the name of a layer."""
    parts = name.split(".")
    where = parts[parts.index("streams") + 1] if "streams" in parts[:-1] else "all streams"
    index = next((part for part in parts if part.isdecimal()), "?")
    return f"{where}, {'joint' if 'streams' in parts else 'single'} block {index}"


def _cells(loads: object) -> list[Cell]:
    if not isinstance(loads, list):
        return []
    cells = []
    for value in map(number, loads):
        shade = round(50 * min(2.0, max(0.0, value))) if math.isfinite(value) else 0
        cells.append(Cell(value if math.isfinite(value) else None, shade))
    return cells
