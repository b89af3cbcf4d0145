"""The report's section about what a checkpoint is worth: the newest of `kinodit evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kinodit.launch.report.read import Run, SampleFile, number
from kinodit.launch.report.told import told
from kinodit.trainer.evaluation.table import PICTURES, loss_rows, sample_groups


def evaluation_section(run: Run) -> dict[str, Any] | None:
    """What the page shows of it; None where the run was never evaluated.

    losses: a row for each task and stream, with a value for each of `levels`; groups: figures of
    clips from captions alone, and of each task that was drawn, with the files of some clips
    """
    losses, groups = loss_rows(run.evaluation), sample_groups(run.evaluation)
    if not (losses or groups):
        return None
    levels = sorted({t for row in losses for t in row.by_level}, key=number)
    return {
        "step": run.evaluation.get("step", "–"),
        "has_tasks": any(row.task for row in losses),
        "levels": levels,
        "losses": [
            {
                "task": row.task,
                "stream": row.stream,
                "mean": row.mean,
                "cells": [row.by_level.get(t, "–") for t in levels],
            }
            for row in losses
        ],
        "groups": [
            {
                "title": task.replace("_", " ") or "from captions",
                "told": told(run.config, "" if task == PICTURES else task, stills=task == PICTURES),
                "num_clips": num_clips,
                "what": _what(run.evaluated.get(task, [])),
                "rows": rows,
                "clips": run.evaluated.get(task, []),
            }
            for task, num_clips, rows in groups
        ],
    }


def _what(files: Sequence[SampleFile]) -> str:
    """What there are so many of."""
    suffixes = {file.path.suffix for file in files}
    if suffixes == {".png"}:
        return "pictures"
    return "sounds" if suffixes and suffixes <= {".wav", ".flac"} else "clips"
