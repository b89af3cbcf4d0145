"""Reads what a run folder holds, whatever state the run was left in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from kinodit.models.errors import UserError
from kinodit.trainer.evaluation.drawn import PICTURES_FOLDER
from kinodit.trainer.evaluation.table import PICTURES
from kinodit.trainer.jsonl import read_rows
from kinodit.trainer.redact import redact, redact_text

Row = dict[str, Any]

SILENCE_S = 180.0
"""A run that has written nothing for so long, and for 20 times its usual pause, has ended."""


class ReportError(UserError):
    """The folder is not a run, or the page cannot be written."""


MAX_MOTION_CLIPS = 24
"""Of the clips that `kinodit measure` sampled, how many the page shows."""
MAX_EVALUATED_CLIPS = 6
"""Of the clips of each task that `kinodit evaluate` drew, how many the page shows."""


@dataclass(frozen=True)
class SampleFile:
    """One sampled clip, picture or sound: its entry of index.json and where its file lies.

    picture: what stands for a file that is only heard
    pictures: those that it was drawn after, or together with
    given: the part of it that was given
    """

    entry: Row
    path: Path
    picture: Path | None = None
    pictures: tuple[Path, ...] = ()
    given: Path | None = None


@dataclass(frozen=True)
class Run:
    """Everything a report shows. Rows are in the order of their steps, one per step and kind.

    samples: (step, files) of every sampling, oldest first; drawn: files of `kinodit sample` and
    the first of `kinodit measure`; motion: what that measured; evaluation: the newest of `kinodit
    evaluate`; evaluated: task ("" for none) -> the first clips that it drew; notes: what could not
    be read.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    events: list[Row]
    samples: list[tuple[int, list[SampleFile]]]
    drawn: list[SampleFile]
    motion: dict[str, Any]
    evaluation: dict[str, Any]
    evaluated: dict[str, list[SampleFile]]
    notes: list[str]

    @property
    def name(self) -> str:
        """The name of the run."""
        return str(self.config.get("run", {}).get("name") or self.folder.resolve().name)

    @property
    def total_steps(self) -> int:
        """Steps the run was asked for; 0 if its config does not say."""
        return int(self.config.get("run", {}).get("steps") or 0)

    @property
    def last_step(self) -> int:
        """The last step of which there is any trace."""
        rows = [*self.train[-1:], *self.validation[-1:], *self.events]
        return max((int(row["step"]) for row in rows), default=0)

    @property
    def last_sign_s(self) -> float:
        """Unix time of the last row or event; 0 if there is none."""
        rows = [*self.train[-1:], *self.events]
        return max((number(row.get("time_s", 0.0)) for row in rows), default=0.0)

    @property
    def wall_s(self) -> float:
        """Seconds spent on the steps that count (those lost to an interruption are not)."""
        total, before = 0.0, None
        for row in self.train:
            count = row["step"] - before if before is not None else _first_window(self.train)
            total += number(row.get("step_s", 0.0)) * count
            before = row["step"]
        return total


def read_run(folder: Path) -> Run:
    """The run in `folder`, with secrets masked.

    Raises:
        ReportError: there is no run.
    """
    config_path = folder / "config.yaml"
    metrics_path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ReportError(f"no run folder at {folder}: pass the folder that training wrote")
    if not config_path.is_file() and not metrics_path.is_file():
        raise ReportError(
            f"{folder} holds neither config.yaml nor metrics.jsonl: pass the folder of one run, "
            "such as runs/NAME"
        )
    notes: list[str] = []
    rows = _rows(metrics_path, notes)
    evaluation, evaluated = _evaluation(folder / "evaluation", notes)
    return Run(
        folder=folder,
        config=redact(_mapping(config_path, notes)),
        environment=redact(_mapping(folder / "environment.json", notes)),
        train=_without_wrong_mfu(_one_per_step(rows, "train"), notes),
        validation=_one_per_step(rows, "validation"),
        events=[_event(row) for row in _rows(folder / "events.jsonl", notes)],
        samples=_samples(folder / "samples", notes),
        drawn=[
            *_files(folder / "samples" / "manual" / "index.json", notes),
            *_files(folder / "samples" / "motion" / "index.json", notes)[:MAX_MOTION_CLIPS],
        ],
        motion=_mapping(folder / "motion.json", notes),
        evaluation=evaluation,
        evaluated=evaluated,
        notes=notes,
    )


@dataclass(frozen=True)
class State:
    """label: one word; detail: a sentence; tone: "good", "busy" or "bad"."""

    label: str
    detail: str
    tone: str


def run_state(run: Run, now: float) -> State:
    """How the run stands at unix time `now`, judged by its last signs of life."""
    turns = [row for row in run.events if row["event"] in ("start", "resume", "stop")]
    stopped = bool(turns) and turns[-1]["event"] == "stop"
    if run.total_steps and run.last_step >= run.total_steps:
        return State("finished", "all steps are done", "good")
    if stopped:
        return State("stopped", str(turns[-1]["message"]) or "before its last step", "bad")
    if not run.train and not run.events:
        return State("empty", "nothing has been logged yet", "bad")
    times = [number(row.get("time_s", 0.0)) for row in run.train[-20:]]
    pauses = [late - early for early, late in pairwise(times)]
    patience_s = max(SILENCE_S, 20 * max(pauses, default=0.0))
    if now - run.last_sign_s <= patience_s:
        return State("running", "as of this page", "busy")
    return State("interrupted", "it ended without a word; the same command resumes it", "bad")


def number(value: Any) -> float:
    """A number of a row, whose non-finite ones are strings; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _first_window(rows: Sequence[Row]) -> int:
    """Steps in the first row: as many as in the second, but not more than there were."""
    first = int(rows[0]["step"])
    window = int(rows[1]["step"]) - first if len(rows) > 1 else first
    return max(1, min(window, first))


def _rows(path: Path, notes: list[str]) -> list[Row]:
    if not path.is_file():
        return []
    rows, broken = [], 0
    for row in read_rows(path):
        if row is not None and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            broken += 1
    if broken:
        lines = "1 line" if broken == 1 else f"{broken} lines"
        notes.append(f"{lines} of {path.name} could not be read and are left out.")
    return rows


def _one_per_step(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of `kind` by step; of several for one step the one written last."""
    by_step = {row["step"]: row for row in rows if row.get("kind") == kind}
    return [by_step[step] for step in sorted(by_step)]


def _without_wrong_mfu(rows: list[Row], notes: list[str]) -> list[Row]:
    """Rows without an MFU above 1, of a peak that was measured while the CPU had other work."""
    num_wrong = sum(number(row.get("mfu", 0.0)) > 1 for row in rows)
    num_left_out = num_wrong + sum("flops" in row and "mfu" not in row for row in rows)
    if num_left_out:
        notes.append(
            f"MFU is left out of {num_left_out} of {len(rows)} rows: no peak is known for the "
            "device, or more was reached than was measured of it while it had other work."
        )
    if not num_wrong:
        return rows
    return [{k: v for k, v in row.items() if k != "mfu" or not number(v) > 1} for row in rows]


def _event(row: Row) -> Row:
    message = redact_text(str(row.get("message", "")))
    return row | {"event": str(row.get("event", "")), "message": message}


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file (JSON is YAML); empty, with a note, if it is broken."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} could not be read and is left out.")
        return {}
    return content


def _evaluation(
    folder: Path, notes: list[str]
) -> tuple[dict[str, Any], dict[str, list[SampleFile]]]:
    """Figures of the newest step that was evaluated, and its clips by task."""
    steps = [path.parent for path in sorted(folder.glob("step-*/evaluation.json"))]
    if not steps:
        return {}, {}
    figures = _mapping(steps[-1] / "evaluation.json", notes)
    indexes = {"": steps[-1] / "index.json"}
    indexes[PICTURES] = steps[-1] / PICTURES_FOLDER / "index.json"
    indexes |= {p.parent.name: p for p in sorted((steps[-1] / "tasks").glob("*/index.json"))}
    clips = {task: _files(path, notes)[:MAX_EVALUATED_CLIPS] for task, path in indexes.items()}
    return figures, clips


def _samples(folder: Path, notes: list[str]) -> list[tuple[int, list[SampleFile]]]:
    found = []
    for index_path in sorted(folder.glob("step-*/index.json")):
        step = index_path.parent.name.removeprefix("step-")
        if step.isdigit():
            found.append((int(step), _files(index_path, notes)))
    return found


def _beside(index_path: Path, name: object) -> Path | None:
    """The file of that plain name beside the index, if there is one."""
    path = index_path.parent / Path(str(name)).name
    return path if name is not None and path.is_file() else None


def _files(index_path: Path, notes: list[str]) -> list[SampleFile]:
    """The files that an index names; none if there is no index."""
    if not index_path.is_file():
        return []
    try:
        entries = json.loads(index_path.read_text(encoding="utf-8"))
    except ValueError:
        where = index_path.parent
        notes.append(f"{where.parent.name}/{where.name} could not be read and is left out.")
        return []
    # Only plain names: an index must not make the report include other files.
    files = [
        SampleFile(
            entry,
            index_path.parent / Path(str(entry["file"])).name,
            _beside(index_path, entry.get("picture")),
            tuple(
                path
                for name in entry.get("pictures", ())
                if (path := _beside(index_path, name)) is not None
            ),
            _beside(index_path, entry.get("given")),
        )
        for entry in entries
    ]
    present = [file for file in files if file.path.is_file()]
    if len(present) < len(files):
        notes.append(
            f"{len(files) - len(present)} sampled files are named in an index but not there."
        )
    return present
