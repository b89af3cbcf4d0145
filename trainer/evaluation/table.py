"""Figures of an evaluation as rows that a person reads, on a terminal or a page.

Figures may come from a file: what is not there, or is no number, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kinodit.trainer.evaluation.losses import GENERATION

TRUTHS = (
    "object",
    "direction",
    "sound",
    "everything_named",
    "onset_within_a_frame",
    "onset_lag_frames",
    "colour_error",
)
"""In the order in which they are shown."""

SHARES = {
    "object", "direction", "sound", "everything_named", "onset_within_a_frame", "within_a_frame",
    "nearer_than_copy",
}  # fmt: skip
"""Figures that are shares of the clips."""
LAGS = (
    ("lag_frames", "picture to sound, frames"),
    ("within_a_frame", "picture and sound within a frame"),
)

OF_PIXELS = " (pixels 0 to 1)"
PICTURES = "pictures from captions"
"""Still images that were drawn from captions beside clips: no task can have this name."""


@dataclass(frozen=True)
class FigureRow:
    """One figure. beside: what to compare it with, such as (("data", "0.98"),)."""

    label: str
    value: str
    beside: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        told = ", ".join(f"{label} {value}" for label, value in self.beside)
        return f"{self.value}  ({told})" if told else self.value


@dataclass(frozen=True)
class LossRow:
    """Losses of a stream under a task: their mean, and by noise level."""

    task: str
    stream: str
    mean: str
    by_level: Mapping[str, str]


def loss_rows(figures: Mapping[str, Any]) -> list[LossRow]:
    """Of every task and stream."""
    rows = []
    for task, streams in _mapping(figures.get("loss")).items():
        for stream, by_level in _mapping(streams).items():
            levels = {t: _text(v, ".3f") for t, v in _mapping(by_level).items() if t != "mean"}
            mean = _text(_mapping(by_level).get("mean"), ".4f")
            rows.append(LossRow("" if task == GENERATION else task, stream, mean, levels))
    return rows


def sample_rows(figures: Mapping[str, Any]) -> list[FigureRow]:
    """Of clips that were drawn, all of one kind."""
    rows = []
    for name in ("fid", "kid", "fvd", "fad", "clip_score"):
        for extractor, value in _mapping(figures.get(name)).items():
            halves = _mapping(figures.get(f"{name}_of_halves") or figures.get(f"{name}_real"))
            label = f"{name.upper().replace('_', ' ')} ({extractor})"
            rows.append(FigureRow(label, _text(value), (("data", _text(halves.get(extractor))),)))
    for extractor, found in _mapping(figures.get("av_synchrony")).items():
        for name, label in LAGS:
            if name in _mapping(found):
                rows.append(_beside(f"{label} ({extractor})", found, name))
    truth = _mapping(figures.get("truth"))
    for name in TRUTHS:
        if name in truth:
            rows.append(_beside(name.replace("_", " "), truth, name))
    synchrony = _mapping(figures.get("synchrony"))
    for name, label in (
        ("lag_frames", "bounce to click, frames"),
        ("within_a_frame", "bounces and clicks within a frame"),
    ):
        if name in synchrony:
            rows.append(_beside(label, synchrony, name))
    fill = _mapping(figures.get("fill"))
    if fill:
        copy, codec = (
            ("copy", _text(fill.get("copy_error"))),
            ("codec", _text(fill.get("codec_error"))),
        )
        filled, kept = _text(fill.get("fill_error")), _text(fill.get("kept_error"))
        rows.append(FigureRow(f"error of what is filled in{OF_PIXELS}", filled, (copy,)))
        rows.append(_beside("clips nearer than a copy", fill, "nearer_than_copy"))
        rows.append(FigureRow(f"error of what is given{OF_PIXELS}", kept, (codec,)))
    edit = _mapping(figures.get("edit"))
    if edit:
        copy = ("copy of the last reference", _text(edit.get("copy_error")))
        error = _text(edit.get("error"))
        rows.append(FigureRow(f"error to the real picture{OF_PIXELS}", error, (copy,)))
        rows.append(_beside("nearer than the copy", edit, "nearer_than_copy"))
    return rows


def sample_groups(figures: Mapping[str, Any]) -> list[tuple[str, int, list[FigureRow]]]:
    """(task, number of clips, rows); the task is "" for clips from captions alone.

    Beside clips, pictures from captions alone are `PICTURES`.
    """
    groups = [
        ("", figures),
        (PICTURES, figures.get("pictures")),
        *_mapping(figures.get("tasks")).items(),
    ]
    return [
        (str(task), int(_number(_mapping(of_task).get("num_samples"), 0)), sample_rows(of_task))
        for task, of_task in groups
        if "num_samples" in _mapping(of_task)
    ]


def summary(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, value) of everything that was measured, for a terminal."""
    rows = []
    for loss in loss_rows(figures):
        label = f"loss of {loss.stream}" + (f", {loss.task}" if loss.task else "")
        levels = ", ".join(f"{value} at {t}" for t, value in loss.by_level.items())
        rows.append((label, f"{loss.mean}  ({levels})"))
    for task, num_clips, of_task in sample_groups(figures):
        before = f"{task}: " if task else ""
        if not num_clips:
            rows.append((task or "clips", "no sample of the validation set has what it is given"))
        rows += [(f"{before}{row.label}", str(row)) for row in of_task]
    return rows


def _beside(label: str, figures: Mapping[str, Any], name: str) -> FigureRow:
    """A figure with what the data reach, and chance."""
    kinds = (("data", "real"), ("chance", "chance"), ("of others", "other"))
    form = ".1%" if name in SHARES else ".3g"
    found = [
        (said, _text(figures[f"{name}_{key}"], form))
        for said, key in kinds
        if f"{name}_{key}" in figures
    ]
    return FigureRow(label, _text(figures.get(name), form), tuple(found))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, otherwise: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else otherwise


def _text(value: Any, form: str = ".3g") -> str:
    number = _number(value)
    text = "–" if math.isnan(number) else format(number, form)
    return text.replace("%", " %")
