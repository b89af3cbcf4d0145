"""Checking a dataset in parts, on several machines, and one verdict from the parts' reports."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinodit.data.manifest import Manifest
from kinodit.data.validate import Problem, ValidationReport
from kinodit.models.errors import UserError


class ReportError(UserError):
    """A part is not one, or the reports of parts do not make a whole."""


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        ReportError: it is not of that form, or i is not below n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ReportError(f"--part {text}: must be I/N with I from 0 to N-1")
    return int(found[1]), int(found[2])


def save_report(path: Path, part: tuple[int, int], report: ValidationReport) -> None:
    """Write what was found in a part, whole or not at all.

    Raises:
        ReportError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"part": part, **asdict(report)}) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from error


def merge_reports(directory: Path, folder: Path) -> ValidationReport:
    """One report of all parts (*.json in `folder`) of the dataset in `directory`.

    Keys are compared across parts: a key must be of one shard only.

    Raises:
        ReportError: there is none, one cannot be read, or a part is missing or there twice.
    """
    reports = [_load(path) for path in sorted(folder.glob("*.json"))]
    if not reports:
        raise ReportError(f"{folder} holds no report: did the job array run?")
    (_, total) = reports[0]["part"]
    parts = sorted(tuple(report["part"]) for report in reports)
    if parts != [(index, total) for index in range(total)]:
        missing = sorted(set(range(total)) - {index for index, _ in parts})
        raise ReportError(
            f"{folder}: the reports are not those of {total} parts; missing: "
            f"{', '.join(map(str, missing)) or 'none, but some do not belong together'}"
        )
    problems = [Problem(**problem) for report in reports for problem in report["problems"]]
    seen: dict[str, str] = {}
    for report in reports:
        for shard, digests in report["keys"].items():
            for digest in digests:
                other = seen.setdefault(digest, shard)
                if other != shard:
                    problems.append(
                        Problem(shard, "", "", "keys of its own", f"one that {other} has, too")
                    )
    num_samples = sum(report["num_samples"] for report in reports)
    expected = Manifest.load(directory).num_samples
    if num_samples != expected:
        raise ReportError(
            f"{folder} is about {num_samples} samples, {directory} has {expected}: check it again"
        )
    return ValidationReport(
        num_samples, sum(report["num_good"] for report in reports), tuple(problems)
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if {"part", "num_samples", "num_good", "problems", "keys"} <= report.keys():
            return report
    except (OSError, ValueError, AttributeError) as error:
        raise ReportError(f"cannot read {path}: {error}") from error
    raise ReportError(f"{path} is not the report of a part")
