"""Acceptance on a node with GPUs: certificate, device tests, presets timed against their plans.

    python benchmarks/gpu_accept.py [--json FILE] [--minutes 30] [--only certificate tests presets]

Uses up to 8 GPUs. Without any, every part runs to its end on pretended CUDA tensors, which have
shapes and formats and no memory: that finds mixed devices, shapes and formats that do not fit,
waits for the device and layouts that do not run. It measures nothing, accepts nothing, and says so
in its first line and in the file. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from kinodit.launch.accept.pretended import forward
from kinodit.launch.accept.timed import Spec, pack_of
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.layouts import full_layouts, layout_name
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.peak import PEAK_TFLOPS_BF16

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PLANNED = ROOT / "configs" / "t2v_2b.yaml"
TIMED = ("300m", "2b", "14b")
MAX_GPUS = 8
TEXT_TOKENS = 226
PRETENDED_GPUS, PRETENDED_GPU, PRETENDED_MEMORY_GIB = 8, "H100", 80.0
SLOWER, FULLER = 1.5, 1.0
"""At most so many times what a plan says of a step's time, and of its memory."""

Row = dict[str, object]


@dataclass
class Part:
    """One part's rows, each with name, value, goal and ok, and what there is to say about it."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float | None, goal: str, ok: bool, **more: object) -> None:
        """One row; a value that was not measured is null."""
        self.rows.append({"name": name, "value": value, "goal": goal, "ok": ok, **more})
        shown = "-" if value is None else f"{value:.4g}"
        print(f"  {name:<58} {shown:>10}  {goal:<18} {'ok' if ok else 'FAILED'}", flush=True)


class Clock:
    """What is left of the time."""

    def __init__(self, minutes: float) -> None:
        self.start_s = time.monotonic()
        self._end_s = self.start_s + 60 * minutes

    def run(self, command: list[str | Path], limit_s: float) -> subprocess.CompletedProcess[str]:
        """The command, at most `limit_s` seconds and what is left; one that is late is killed."""
        limit_s = min(limit_s, self._end_s - time.monotonic())
        words = [str(word) for word in command]
        if limit_s <= 0:
            return subprocess.CompletedProcess(words, 124, "", "no time was left for it")
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return subprocess.CompletedProcess(words, 124, out, f"stopped after {limit_s:.0f} s")
        return subprocess.CompletedProcess(words, process.returncode, out, err)


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    """Why a command failed, in its own words."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return " | ".join(lines[-3:])


def certificate(part: Part, clock: Clock, num_gpus: int, folder: Path) -> None:
    """Every recipe's twin: on real devices compared with one, on pretended ones laid out."""
    if num_gpus == 0:
        for recipe in RECIPES:
            _pretended_certificate(part, recipe)
        return
    if num_gpus == 1:
        part.notes.append("one GPU has no layouts: nothing was compared")
        part.add("certificate", None, "2 GPUs or more", False)
        return
    for recipe in RECIPES:
        file = folder / f"{recipe.stem}.json"
        command = [KINODIT, "certify", recipe, "--device", "cuda", "--size", "full"]
        command += ["--world", str(num_gpus), "--json", file, "--certificate", folder / "kept.json"]
        done = clock.run(command, limit_s=300)
        if not file.is_file():
            part.add(f"certificate/{recipe.stem}", None, "runs", False, why=last_lines(done))
            continue
        for row in json.loads(file.read_text()):
            name = f"certificate/{recipe.stem}/{row['layout']}"
            part.add(name, row["noise_ratio"], "<= 4 x noise", row["ok"], faults=row["faults"])


def _pretended_certificate(part: Part, recipe: Path) -> None:
    small = twin(load_config(recipe, []))
    model = small.config.model
    spec = Spec("", dict.fromkeys(model.streams, 37), 2, 1, ParallelConfig(dp_shard=1))
    pack = pack_of(model, spec, range(2))
    for layout in full_layouts(model, ParallelConfig(), MAX_GPUS):
        found = forward(model, layout, pack, rank=1)
        name = f"pretended certificate/{recipe.stem}/{layout_name(layout)}"
        is_split = layout.tp > 1
        ok = (found.messages("alltoall") > 0) == (layout.ulysses > 1 or layout.ep > 1)
        ok &= (found.messages("allgather") > 0) == is_split
        part.add(name, None, "runs", ok, ops=found.ops.total())


def tests(part: Part, clock: Clock, num_gpus: int, folder: Path) -> None:
    """`tests -m gpu`, or those that pretend a device."""
    report = folder / "tests.xml"
    chosen = ["-m", "gpu"] if num_gpus else ["tests/cuda_fake"]
    name = "tests/gpu" if num_gpus else "pretended tests"
    done = clock.run([PYTHON, "-m", "pytest", "-q", *chosen, f"--junit-xml={report}"], 420)
    if not report.is_file():
        part.add(name, None, "runs", False, why=last_lines(done))
        return
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if counts["skipped"]:
        part.notes.append(f"{counts['skipped']} tests were skipped")
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    ok = done.returncode == 0 and passed > 0
    part.add(name, float(passed), "all pass, >= 1", ok, failed=failed, **counts)


def presets(part: Part, clock: Clock, num_gpus: int, folder: Path) -> None:
    """The fastest layout that a plan finds for each preset: its step against the plan's."""
    gpu, memory_gib = device_kind(part) if num_gpus else (PRETENDED_GPU, PRETENDED_MEMORY_GIB)
    count = num_gpus or PRETENDED_GPUS
    for preset in TIMED:
        file = folder / f"plan-{preset}.json"
        command = [KINODIT, "plan", PLANNED, f"model.preset={preset}"]
        command += [f"data.samples_per_step={count}", f"data.packs_per_step={count}"]
        command += ["--gpus", str(count), "--gpu", gpu, "--gpu-memory", f"{memory_gib:.1f}"]
        command += ["--text-tokens", str(TEXT_TOKENS), "--encoder-gib", "0", "--json", file]
        done = clock.run(command, 120)
        planned = json.loads(file.read_text())["layouts"] if file.is_file() else []
        if not planned:
            part.add(f"presets/{preset}", None, "fits a plan", False, why=last_lines(done))
            continue
        step = json.loads(file.read_text())["step"]
        spec = planned_spec(preset, planned[0], step)
        said = {
            "layout": layout_name(spec.parallel),
            "remat": spec.remat.mode,
            "planned_s": planned[0]["step_s"],
            "planned_bytes": planned[0]["memory_total"],
        }
        if num_gpus:
            _timed(part, clock, spec, said, folder)
        else:
            _pretended_preset(part, spec, said)


def planned_spec(preset: str, chosen: dict[str, object], step: dict[str, object]) -> Spec:
    """What is timed, as a plan says it."""
    degrees = {name: chosen[name] for name in ("dp_replicate", "dp_shard", "cp", "ring", "tp")}
    return Spec(
        preset,
        step["tokens"],  # type: ignore[arg-type]
        step["segments"],  # type: ignore[arg-type]
        step["packs"],  # type: ignore[arg-type]
        ParallelConfig(**degrees),  # type: ignore[arg-type]
        RematConfig(chosen["remat"]),  # type: ignore[arg-type]
    )


def _timed(part: Part, clock: Clock, spec: Spec, said: Row, folder: Path) -> None:
    asked, found = folder / f"spec-{spec.preset}.json", folder / f"time-{spec.preset}.json"
    asked.write_text(json.dumps(spec.to_json()))
    parallel = spec.parallel
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp
    command = [
        PYTHON,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    done = clock.run([*command, "-m", "kinodit.launch.accept.timed", asked, found], 330)
    if not found.is_file():
        part.add(f"presets/{spec.preset}", None, "runs", False, why=last_lines(done), **said)
        return
    timing = json.loads(found.read_text())
    slower = timing["step_s"] / float(str(said["planned_s"]))
    fuller = timing["peak_bytes"] / float(str(said["planned_bytes"]))
    more = {**said, **timing}
    part.add(f"presets/{spec.preset}/time", slower, f"<= {SLOWER} x plan", slower <= SLOWER, **more)
    part.add(
        f"presets/{spec.preset}/memory", fuller, f"<= {FULLER} x plan", fuller <= FULLER, **more
    )


def _pretended_preset(part: Part, spec: Spec, said: Row) -> None:
    """All blocks of the preset on the plan's tokens, as one rank has them."""
    model = PRESETS[spec.preset]
    found = forward(model, spec.parallel, pack_of(model, spec, range(spec.segments)))
    (shape,) = found.shapes.values()
    share = spec.segments * spec.tokens["video"] // (spec.parallel.cp * spec.parallel.tp)
    ok = share <= shape[0] <= share + 1
    part.add(f"pretended presets/{spec.preset}", None, "runs", ok, ops=found.ops.total(), **said)


def device_kind(part: Part) -> tuple[str, float]:
    """(the data sheet to plan with, GiB) of the first GPU."""
    found = torch.cuda.get_device_properties(0)
    sheets = [name for name in PEAK_TFLOPS_BF16 if name in found.name.upper()]
    if not sheets:
        part.notes.append(f"no data sheet of {found.name!r}: planned as {PRETENDED_GPU}")
    return (sheets or [PRETENDED_GPU])[0], found.total_memory / 2**30


PYTHON = sys.executable
KINODIT = Path(sys.executable).parent / "kinodit"
PARTS: dict[str, Callable[[Part, Clock, int, Path], None]] = {
    "certificate": certificate,
    "tests": tests,
    "presets": presets,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--minutes", type=float, default=30.0, help="at most (default: 30)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    args = parser.parse_args()
    clock = Clock(args.minutes)
    num_gpus = min(MAX_GPUS, torch.cuda.device_count())
    devices = [torch.cuda.get_device_name(index) for index in range(num_gpus)]
    says = (
        f"{num_gpus} GPU(s): {', '.join(sorted(set(devices)))}"
        if num_gpus
        else "no CUDA device: all parts run on pretended CUDA tensors; nothing is measured"
    )
    print(says, flush=True)
    document: dict[str, object] = {
        "measured": num_gpus > 0,
        "says": says,
        "devices": devices,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    ok, shown = True, {}
    for name in args.only:
        part, start_s = Part(), time.monotonic()
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](part, clock, num_gpus, Path(folder))
        for note in part.notes:
            print(f"  {note}")
        good = bool(part.rows) and all(row["ok"] for row in part.rows)
        seconds = time.monotonic() - start_s
        shown[name] = {"ok": good, "seconds": seconds, "notes": part.notes, "rows": part.rows}
        ok &= good
    seconds = time.monotonic() - clock.start_s
    document |= {"accepted": ok and num_gpus > 0, "ran": ok, "seconds": seconds, "parts": shown}
    verdict = "accepted" if num_gpus else "ran to its end, nothing was accepted"
    print(f"{verdict if ok else 'FAILED'} in {seconds:.0f} s: {says}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if ok else 1


def commit() -> str:
    """Of this checkout; "" where git is not."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
