"""Rows as columns that a page can hold: a run of 100,000 rows becomes at most `MAX_POINTS`.

Where rows are too many, each point is the mean of a group of neighbouring rows, and the lowest and
highest value of the group go along as a band, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kinodit.launch.report.read import Row, number

MAX_POINTS = 1500

RARE = 0.02
"""A noise bin with a smaller share of the tokens shows chance: it is not drawn unless asked for."""
PROFILES = (0.1, 0.3, 0.6, 1.0)
"""Places in a run at which its loss over the noise level is shown."""

NON_FINITE = ("NaN", "Infinity", "-Infinity")
"""How rows write the numbers that JSON lacks."""

Values = list[float | None]

TIME_PARTS = {
    "compute_s": "compute",
    "encode_s": "encoding",
    "data_wait_s": "data",
    "checkpoint_s": "checkpoint",
    "eval_s": "evaluation",
}
"""Keys of the parts of a step's time, in the order in which they are stacked."""


def group_size(num_rows: int) -> int:
    """Rows that share a point."""
    return max(1, math.ceil(num_rows / MAX_POINTS))


def train_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that is drawn over the steps of training.

    step: the last step of each group; time_h: hours of training until then;
    columns: name -> {mean, low?, high?};
    bins: modality -> {edges, values: a list per bin, rare: whether hardly any token falls into it};
    profiles: see `noise_profiles`; parts: name -> seconds per step;
    broken: steps whose loss is not a number; rows_per_point.
    """
    size = group_size(len(rows))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    names = [name for name in _numeric_keys(rows) if name not in ("step", "time_s")]
    columns = {name: _column(groups, name, size > 1) for name in names}
    return {
        "step": [group[-1]["step"] for group in groups],
        "time_h": _hours(rows, groups),
        "columns": columns,
        "bins": _noise_bins(groups),
        "profiles": noise_profiles(rows),
        "parts": _time_parts(groups, names),
        "broken": [row["step"] for row in rows if not math.isfinite(number(row.get("loss", 0.0)))],
        "rows_per_point": size,
    }


def validation_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Validation: step, columns: name -> values, bins: modality -> {levels, values per level}."""
    levels: dict[str, list[str]] = {}
    for row in rows:
        for modality, by_level in row.get("bins", {}).items():
            known = levels.setdefault(modality, [])
            known += [level for level in by_level if level not in known]
    return {
        "step": [row["step"] for row in rows],
        "columns": {
            name: [clean(number(row.get(name))) for row in rows]
            for name in _numeric_keys(rows)
            if name not in ("step", "time_s")
        },
        "bins": {
            modality: {
                "levels": sorted(float(level) for level in known),
                "values": [
                    [
                        clean(number(row.get("bins", {}).get(modality, {}).get(level)))
                        for row in rows
                    ]
                    for level in sorted(known, key=float)
                ],
            }
            for modality, known in levels.items()
        },
    }


def clean(value: float) -> float | None:
    """Six digits, which is more than a pixel shows; None for what is not a number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _column(groups: Sequence[Sequence[Row]], name: str, band: bool) -> dict[str, Values]:
    values = [[number(row.get(name)) for row in group] for group in groups]
    column = {"mean": [clean(mean(group)) for group in values]}
    if band:
        finite = [[value for value in group if math.isfinite(value)] for group in values]
        column["low"] = [clean(min(group, default=math.nan)) for group in finite]
        column["high"] = [clean(max(group, default=math.nan)) for group in finite]
    return column


def _numeric_keys(rows: Sequence[Row]) -> list[str]:
    """Keys with a number (or a number that JSON lacks) in any row, in order of appearance."""
    keys: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) or value in NON_FINITE:
                keys.setdefault(key)
    return list(keys)


def _hours(rows: Sequence[Row], groups: Sequence[Sequence[Row]]) -> Values:
    """Hours of training until the end of each group; pauses between runs do not count."""
    hours: Values = []
    total_s, before = 0.0, 0
    for group in groups:
        for row in group:
            seconds = number(row.get("step_s", 0.0)) * (row["step"] - before)
            total_s += seconds if math.isfinite(seconds) else 0.0
            before = row["step"]
        hours.append(clean(total_s / 3600))
    return hours


def _noise_bins(groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Mean loss of each noise bin in each group, weighted by the bins' counts."""
    sums = [_bin_sums(group) for group in groups]
    modalities = dict.fromkeys(modality for group in sums for modality in group)
    result = {}
    for modality in modalities:
        edges = sorted({edge for group in sums for edge in group.get(modality, ())})
        values = [[_ratio(group.get(modality, {}).get(edge)) for group in sums] for edge in edges]
        counts = [
            sum(group.get(modality, {}).get(e, (0.0, 0.0))[1] for group in sums) for e in edges
        ]
        result[modality] = {
            "edges": edges,
            "values": values,
            "rare": [count < RARE * sum(counts) for count in counts],
        }
    return result


def noise_profiles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Loss over the noise level at `PROFILES` of the run: step, modality -> [[t, loss], ...].

    Each is the count-weighted mean over a tenth of the rows; bins that hardly any token fell into
    then are left out, since they show chance.
    """
    if len(rows) < 2 * len(PROFILES):
        return []
    width = max(2, len(rows) // 10)
    profiles = []
    for place in PROFILES:
        end = max(width, round(place * len(rows)))
        window = rows[end - width : end]
        curves = {}
        for modality, sums in _bin_sums(window).items():
            tokens = sum(count for _, count in sums.values())
            curves[modality] = [
                [(low + high) / 2, clean(total / count)]
                for (low, high), (total, count) in sorted(sums.items())
                if count and count >= RARE * tokens
            ]
        profiles.append({"step": window[-1]["step"], "curves": curves})
    return profiles


def _bin_sums(group: Sequence[Row]) -> dict[str, dict[tuple[float, float], list[float]]]:
    """modality -> (low, high) -> [sum of losses times counts, sum of counts]."""
    sums: dict[str, dict[tuple[float, float], list[float]]] = {}
    for row in group:
        for modality, bins in row.get("noise_bins", {}).items():
            of_modality = sums.setdefault(modality, {})
            for low, high, loss, count in bins:
                total = of_modality.setdefault((low, high), [0.0, 0.0])
                weighted = number(loss) * count
                if math.isfinite(weighted):
                    total[0] += weighted
                    total[1] += count
    return sums


def _ratio(total: list[float] | None) -> float | None:
    return clean(total[0] / total[1]) if total is not None and total[1] else None


def _time_parts(groups: Sequence[Sequence[Row]], names: Sequence[str]) -> Mapping[str, Values]:
    """Seconds per step of each known part that occurs, and what the parts leave of step_s."""
    keys = [key for key in TIME_PARTS if key in names]
    if "step_s" not in names or not keys:
        return {}
    parts: dict[str, Values] = {name: [] for name in (*(TIME_PARTS[key] for key in keys), "other")}
    for group in groups:
        spent = 0.0
        for key in keys:
            seconds = mean([number(row.get(key)) for row in group])
            seconds = seconds if math.isfinite(seconds) else 0.0
            spent += seconds
            parts[TIME_PARTS[key]].append(clean(seconds))
        whole = mean([number(row.get("step_s")) for row in group])
        parts["other"].append(clean(max(0.0, whole - spent)) if math.isfinite(whole) else 0.0)
    return parts
