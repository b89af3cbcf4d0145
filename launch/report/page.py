"""Makes the page: facts as HTML, numbers as JSON for the charts, media as data URIs."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

import kinodit
from kinodit.launch.report.account import time_section
from kinodit.launch.report.evaluation import evaluation_section
from kinodit.launch.report.experts import expert_maps
from kinodit.launch.report.read import (
    ReportError,
    Row,
    Run,
    SampleFile,
    number,
    read_run,
    run_state,
)
from kinodit.launch.report.series import mean, train_columns, validation_columns
from kinodit.launch.report.told import told
from kinodit.trainer.progress import duration
from kinodit.trainer.streams import NOT_EXACT, streamed_in

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
MAX_EVENTS = 500
MARKED = ("resume", "rollback", "hang", "crash", "corruption", "warning")
"""Events that the charts show as lines."""
MAX_SHEET_BYTES = 4 << 20
"""Of a contact sheet: larger ones are left as files."""
RECENT = 0.1
"""Share of the rows, the last ones, that "recent" means in the figures at the top."""


def write_report(
    run_dir: Path,
    output: Path | None = None,
    *,
    max_media_mib: float = 64.0,
    now: float | None = None,
) -> Path:
    """Write the report of the run in `run_dir` to `output` (RUN/report.html) and return its path.

    Samples of evenly spread steps are left out where all would be more than `max_media_mib`.

    Raises:
        ReportError: there is no run, or the page cannot be written.
    """
    run = read_run(run_dir)
    html = render(run, time.time() if now is None else now, max_media_mib)
    path = output or run_dir / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}; try --output") from error
    return path


def render(run: Run, now: float, max_media_mib: float) -> str:
    """The page as text; everything that it shows is inside it."""
    samples, left_out = _embed_samples(run.samples, max_media_mib)
    notes = list(run.notes)
    if left_out:
        notes.append(
            f"Samples of {left_out} of {len(run.samples)} steps are left out to keep this page "
            f"below {max_media_mib:g} MiB of media (--max-media-mib); their files are in the run."
        )
    data = {
        "train": train_columns(run.train),
        "validation": validation_columns(run.validation),
        "marks": _marks(run.events),
        "samples": samples,
        "total_steps": run.total_steps,
    }
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    state = run_state(run, now)
    return environment.from_string(_asset("page.html.j2")).render(
        run=run,
        state=state,
        progress=min(1.0, run.last_step / run.total_steps) if run.total_steps else None,
        facts=_facts(run, now),
        tiles=_tiles(run),
        spent=time_section(run),
        experts=expert_maps(run.train),
        evaluation=evaluation_section(run),
        embed=_embed,
        sheet=_sheet,
        told=partial(told, run.config),
        sampled_task=str(run.config.get("sample", {}).get("task") or ""),
        drawn=[_embed(file) for file in run.drawn],
        notes=notes,
        events=_event_rows(run.events),
        num_events=len(run.events),
        config_sections=_config_sections(run.config),
        version=kinodit.__version__,
        made=_clock(now),
        # "<" would let a string close the script element it is in.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        style=_asset("page.css"),
        scripts=[_asset(name) for name in ("drawing.js", "chart.js", "charts.js", "samples.js")],
    )


def _asset(name: str) -> str:
    return (resources.files("kinodit.launch.report") / name).read_text(encoding="utf-8")


def _facts(run: Run, now: float) -> list[tuple[str, str]]:
    """What stands under the name: (label, value)."""
    started = next((number(row.get("time_s")) for row in run.events), math.nan)
    environment = run.environment
    ranks = int(environment.get("num_ranks") or 0)
    resumes = sum(row["event"] == "resume" for row in run.events)
    steps = f"{run.last_step:,}"
    if run.total_steps:
        steps += f" of {run.total_steps:,}"
    facts = [("steps", steps)]
    if run.wall_s > 0:
        facts.append(("training time", duration(run.wall_s)))
    if math.isfinite(started):
        facts.append(("started", _clock(started)))
    if run.last_sign_s:
        facts.append(("last sign", _clock(run.last_sign_s)))
    if streams := streamed_in(run.config):
        facts.append(("data order", f"{NOT_EXACT}: {', '.join(streams)}"))
    if resumes:
        facts.append(("resumed", "once" if resumes == 1 else f"{resumes} times"))
    if "device" in environment:
        device = str(environment["device"])
        facts.append(("device", f"{ranks} ranks on {device}" if ranks > 1 else device))
    versions = [
        f"{key} {environment[key]}" for key in ("kinodit", "torch", "python") if key in environment
    ]
    if versions:
        facts.append(("versions", ", ".join(versions)))
    return facts


def _tiles(run: Run) -> list[dict[str, str]]:
    """The figures at the top: label, value, unit, hint."""
    rows = run.train
    recent = rows[-max(1, round(len(rows) * RECENT)) :]

    def average(key: str, of: Sequence[Row] = recent) -> float:
        return mean([number(row[key]) for row in of if key in row])

    tiles = []

    def add(label: str, value: float, text: str, unit: str, hint: str) -> None:
        if math.isfinite(value):
            tiles.append({"label": label, "value": text, "unit": unit, "hint": hint})

    loss = average("loss")
    first = average("loss", rows[: max(1, len(rows) // 100)])
    add("Loss", loss, f"{loss:.4g}", "", f"from {first:.4g}; mean of the last {_rows_text(recent)}")
    best = _best_validation(run.validation)
    if best is not None:
        last, lowest, step = best
        add("Validation loss", last, f"{last:.4g}", "", f"lowest {lowest:.4g} at step {step:,}")
    rate, samples = average("tokens_per_s"), average("samples_per_s")
    hint = f"{samples:.3g} samples/s" if math.isfinite(samples) else "recent"
    add("Throughput", rate, _short(rate), "tokens/s", hint)
    mfu = average("mfu")
    add("MFU", mfu, f"{100 * mfu:.1f}", "%", "of the peak FLOP/s, by the model alone")
    step_s = average("step_s")
    wait = average("data_wait_s") / step_s if step_s > 0 else math.nan
    add("Data wait", wait, f"{100 * wait:.1f}", "%", f"of a step of {step_s:.3g} s")
    memory = max(
        (number(row["memory_gib"]) for row in rows if "memory_gib" in row), default=math.nan
    )
    add("Peak memory", memory, f"{memory:.3g}", "GiB", "of the first rank")
    if run.motion:
        accuracy = number(run.motion.get("accuracy"))
        hint = f"of {run.motion.get('num_clips')} clips; chance is 25 %"
        add("Moves as told", accuracy, f"{100 * accuracy:.0f}", "%", hint)
    return tiles


def _best_validation(rows: Sequence[Row]) -> tuple[float, float, int] | None:
    """(last, lowest, step of the lowest) of the first validation loss that is measured."""
    key = next((key for row in rows for key in row if key.startswith("loss")), None)
    values = [(number(row[key]), row["step"]) for row in rows if key in row]
    finite = [value for value in values if math.isfinite(value[0])]
    if not finite:
        return None
    return finite[-1][0], *min(finite)


def _marks(events: Sequence[Row]) -> list[dict[str, Any]]:
    """Events that the charts show as lines."""
    return [
        {"step": row["step"], "event": row["event"]} for row in events if row["event"] in MARKED
    ]


def _event_rows(events: Sequence[Row]) -> list[dict[str, str]]:
    """The table, newest first."""
    return [
        {
            "time": _clock(number(row.get("time_s"))),
            "step": f"{row['step']:,}",
            "event": row["event"],
            "message": row["message"],
        }
        for row in reversed(events[-MAX_EVENTS:])
    ]


def _config_sections(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(section, its YAML, number of keys)."""
    sections = []
    for name, value in config.items():
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()
        text = text.removesuffix("\n...").strip()
        count = len(value) if isinstance(value, dict) else 1
        sections.append((name, text, f"{count} key{'s' if count != 1 else ''}"))
    return sections


def _embed_samples(
    samples: Sequence[tuple[int, list[SampleFile]]], max_media_mib: float
) -> tuple[list[dict[str, Any]], int]:
    """Samples with their files as data URIs, and how many steps had to be left out."""
    sizes = [sum(file.path.stat().st_size for file in files) for _, files in samples]
    kept = _spread(sizes, max_media_mib * 2**20 * 3 / 4)
    embedded = [
        {"step": samples[index][0], "entries": [_embed(file) for file in samples[index][1]]}
        for index in kept
    ]
    return embedded, len(samples) - len(kept)


def _spread(sizes: Sequence[int], limit: float) -> list[int]:
    """Indices of as many evenly spread entries as fit, the first and the last among them."""
    for count in range(len(sizes), 1, -1):
        kept = sorted({round(i * (len(sizes) - 1) / (count - 1)) for i in range(count)})
        if sum(sizes[index] for index in kept) <= limit:
            return kept
    return [len(sizes) - 1] if sizes and sizes[-1] <= limit else []


def _embed(file: SampleFile) -> dict[str, Any]:
    media_type, src = _data_uri(file.path)
    details = (
        "prompt", "task", "seed", "steps", "guidance", "fps", "num_frames", "height", "width",
    )  # fmt: skip
    embedded = {
        **{key: file.entry[key] for key in details if key in file.entry},
        "kind": media_type.split("/")[0],
        "has_sound": "sound" in file.entry,
        "src": src,
    }
    if file.pictures:
        embedded["pictures"] = [_data_uri(path)[1] for path in file.pictures]
    if file.given is not None:
        embedded["given"] = _data_uri(file.given)[1]
    if file.picture is not None:
        embedded["picture"] = _data_uri(file.picture)[1]
    return embedded


def _sheet(files: Sequence[SampleFile]) -> str:
    """The contact sheet of the folder that these files are in; "" if there is none to show."""
    path = files[0].path.parent / "sheet.png" if files else Path()
    if not path.is_file() or path.stat().st_size > MAX_SHEET_BYTES:
        return ""
    return _data_uri(path)[1]


def _data_uri(path: Path) -> tuple[str, str]:
    """(media type, the file's content as a URI)."""
    media_type = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
    content = base64.b64encode(path.read_bytes()).decode()
    return media_type, f"data:{media_type};base64,{content}"


def _rows_text(rows: Sequence[Row]) -> str:
    return "row" if len(rows) == 1 else f"{len(rows):,} rows"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
