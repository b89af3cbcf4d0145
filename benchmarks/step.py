"""Time of a training step, ours against diffusers' transformers of the same shape and weights.

    python benchmarks/step.py [--rows 'sd3/*' 'mfu/*'] [--json FILE] [--minutes 12] [--parts 2]

One thread, process CPU time, repeats interleaved, the faster half of them counts. Measurements are
shared between two processes where there are two cores; what a row compares is in one process. A row
is our time over theirs (forward and backward of all parameters), below 1 if ours is faster; `mfu/*`
is the share of a matrix product's speed in the same run that our model reaches;
`packed_vs_padded/*` a speed-up; `per_frame_overhead` what one noise level per frame costs over one
for all; then what carries over to other devices: kernels and bytes of a compiled block, bytes kept
for the backward, host syncs. Outputs are compared before anything is timed. Rows that no longer fit
into the time are skipped and named; so are bf16 rows where the CPU has no fast bf16.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import torch
from contenders import Contender, Pair, per_frame_pair
from counts import activation_bytes, compiled_block, host_syncs, minimal_pointwise_bytes
from goals import Goal, goal_of, write_rows
from peers import PAIRS, packed_pair

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW = dict[str, object]
GOALS = (
    Goal("mfu/*/fp32/1024", 0.78, at_least=True),
    Goal("mfu/*/bf16/1024", 0.50, at_least=True),
    # Attention is most of it, slower than a matrix product on a CPU: what diffusers' SD3 reached.
    Goal("mfu/*/fp32/4096", 0.66, at_least=True),
    Goal("mfu/*/bf16/4096", 0.47, at_least=True),
    Goal("packed_vs_padded/*", 1.9, at_least=True),
    Goal("per_frame_overhead", 0.05),
    Goal("host_syncs", 0.0),
    Goal("*/*/*/*", 1.05),  # our time over theirs: at most 1, and 0.05 for noise
)
"""Counts of a block have no fixed goal: theirs, counted in the same run."""
GUESS_S = {"eager": 30.0, "compiled": 90.0, "packed": 60.0, "counts": 90.0}
"""What a measurement takes before one of its kind was timed."""


def timed(contender: Contender) -> float:
    """CPU seconds of one forward and backward pass."""
    start = time.process_time()
    contender.run().square().mean().backward()
    elapsed = time.process_time() - start
    contender.model.zero_grad(set_to_none=True)
    return elapsed


def duel(theirs: Contender, ours: Contender, repeats: int, warm: bool = True) -> ROW:
    """Interleaved repeats of both; `value` is the ratio of the means of the faster halves.

    Neighbours on the machine only ever add time, so the slower half says little; but a single
    least time is a lucky one on a noisy machine.
    """
    if warm:
        timed(theirs), timed(ours)
    times: list[tuple[float, float]] = [(timed(theirs), timed(ours)) for _ in range(repeats)]
    faster = (repeats + 1) // 2
    theirs_s, ours_s = (
        statistics.mean(sorted(column)[:faster]) for column in zip(*times, strict=True)
    )
    paired = statistics.median(mine / other for other, mine in times)
    return {
        "value": ours_s / theirs_s,
        "median_of_pairs": paired,
        "ours_s": ours_s,
        "theirs_s": theirs_s,
        "repeats": repeats,
    }


def matmul_speed(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best


def check_agreement(theirs: Contender, ours: Contender) -> None:
    """The two models are the same function: the comparison is of code, not of architectures."""
    with torch.no_grad():
        expected, found = theirs.run(), ours.run()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    limit = 1e-4 if expected.dtype == torch.float32 else 0.2
    if error > limit:
        raise SystemExit(
            f"{ours.name} and {theirs.name} differ by {error:.1e} of the largest value"
        )


class Run:
    """The rows, in the order in which they matter, and the time they may take."""

    def __init__(
        self, patterns: list[str], minutes: float, repeats: int, part: int = 0, num_parts: int = 1
    ) -> None:
        """Takes every `num_parts`-th measurement from `part` on."""
        self.patterns, self.repeats = patterns, repeats
        self.part, self.num_parts = part, num_parts
        self.start, self.limit_s = time.monotonic(), 60 * minutes
        self.rows: dict[str, tuple[float, Goal]] = {}
        self.skipped: dict[str, str] = {}
        self.peak = {"fp32": matmul_speed(torch.float32, 1536)}
        self.last_s: dict[str, float] = {}

    def wants(self, *names: str) -> bool:
        """Whether any of the rows was asked for."""
        return any(fnmatch.fnmatch(name, p) for name in names for p in self.patterns)

    def add(self, name: str, row: ROW) -> None:
        """Keep and print a row that was asked for."""
        if not self.wants(name):
            return
        value = float(str(row["value"]))
        theirs = row.get("theirs")
        goal = goal_of(name, GOALS) if theirs is None else Goal(name, float(str(theirs)))
        self.rows[name] = value, goal
        rest = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key != "value"
        )
        verdict = "ok" if goal.is_met(value) else "MISS"
        print(f"{name:36s} {value:>10.3f} {goal.value:>10.3f}  {verdict:4s}  {rest}", flush=True)

    def fits(self, name: str, kind: str) -> bool:
        """Whether a row like the last one of its kind can still end in time."""
        left_s = self.limit_s - (time.monotonic() - self.start)
        guess_s = next((value for part, value in GUESS_S.items() if part in kind), 0.0)
        if left_s > 1.1 * self.last_s.get(kind, guess_s):
            return True
        self.skip(name, f"{left_s:.0f} s left")
        return False

    def skip(self, name: str, why: str) -> None:
        """Name a row that is not measured, and why."""
        self.skipped[name] = why
        print(f"{name:36s}  skipped: {why}", flush=True)

    def everything(self) -> None:
        """All rows of this part that were asked for."""
        for step in islice(self.steps(), self.part, None, self.num_parts):
            step()
            gc.collect()

    def steps(self) -> Iterator[Callable[[], None]]:
        """Measurements, the most telling first."""

        def pairs(mode: str, dtype: str, tokens: int) -> Iterator[Callable[[], None]]:
            return (partial(self.pair, model, mode, dtype, tokens) for model in PAIRS)

        yield self.host_syncs
        yield from pairs("eager", "fp32", 1024)
        yield partial(self.packed, "fp32")
        yield self.per_frame
        yield from pairs("eager", "bf16", 1024)
        yield partial(self.packed, "bf16")
        yield from pairs("compiled", "fp32", 1024)
        yield partial(self.block_counts, "sd3")
        yield from pairs("eager", "fp32", 4096)
        yield from pairs("compiled", "bf16", 1024)
        yield from pairs("eager", "bf16", 4096)
        yield partial(self.block_counts, "flux")
        yield from pairs("compiled", "fp32", 4096)
        yield from pairs("compiled", "bf16", 4096)

    def has_fast(self, dtype: str, name: str) -> bool:
        """Whether this CPU has a fast matrix product of `dtype`."""
        if dtype not in self.peak:
            small = matmul_speed(DTYPES[dtype], 256)
            fast = small > 0.5 * self.peak["fp32"]
            self.peak[dtype] = matmul_speed(DTYPES[dtype], 1536) if fast else small
        if self.peak[dtype] > 0.5 * self.peak["fp32"]:
            return True
        peaks = f"{self.peak[dtype] / 1e9:.1f} GFLOP/s against {self.peak['fp32'] / 1e9:.0f}"
        self.skip(name, f"no fast {dtype} on this CPU ({peaks} in fp32)")
        return False

    def pair(self, model: str, mode: str, dtype: str, tokens: int) -> None:
        """One of diffusers' models against ours; SD3's shape also gives our MFU."""
        name, kind = f"{model}/{mode}/{dtype}/{tokens}", f"{mode}/{dtype}/{tokens}"
        mfu = f"mfu/{kind}"
        if not self.wants(name, *([mfu] if model == "sd3" else [])):
            return
        if not self.has_fast(dtype, name) or not self.fits(name, kind):
            return
        start = time.monotonic()
        torch.manual_seed(0)
        torch.compiler.reset()
        theirs, ours = PAIRS[model](tokens, DTYPES[dtype])
        if model != "wan":
            check_agreement(theirs, ours)
        if mode == "compiled":
            theirs.compile()
            ours.compile()
        is_long = tokens > 1024
        repeats = min(3, self.repeats) if is_long else self.repeats
        row = duel(theirs, ours, repeats, warm=not is_long or mode == "compiled")
        self.add(name, row)
        if model == "sd3":
            self.peak[dtype] = max(self.peak[dtype], matmul_speed(DTYPES[dtype], 1536))
            speed = ours.flops / float(str(row["ours_s"]))
            self.add(mfu, {"value": speed / self.peak[dtype], "gflops_s": speed / 1e9})
        self.last_s[kind] = time.monotonic() - start

    def packed(self, dtype: str) -> None:
        """Eight images of different sizes, packed and padded."""
        name = f"packed_vs_padded/{dtype}"
        if not self.wants(name) or not self.has_fast(dtype, name) or not self.fits(name, name):
            return
        torch.manual_seed(0)
        theirs, ours, padding = packed_pair(DTYPES[dtype])
        row = duel(theirs, ours, min(3, self.repeats))
        row["value"] = 1 / float(str(row["value"]))
        row["median_of_pairs"] = 1 / float(str(row["median_of_pairs"]))
        self.add(name, {**row, "padding": padding})

    def per_frame(self) -> None:
        """One noise level for each of 16 frames against one for all."""
        if not self.wants("per_frame_overhead"):
            return
        torch.manual_seed(0)
        row = duel(*per_frame_pair(torch.float32), repeats=max(15, self.repeats))
        row["value"] = float(str(row["value"])) - 1
        row["median_of_pairs"] = float(str(row["median_of_pairs"])) - 1
        self.add("per_frame_overhead", row)

    def host_syncs(self) -> None:
        """Ops of one step that would make a host wait for its device."""
        if self.wants("host_syncs"):
            scalar, per_frame = per_frame_pair(torch.float32)
            found = host_syncs(scalar) + host_syncs(per_frame)
            self.add("host_syncs", {"value": float(len(found)), "ops": sorted(set(found))})

    def block_counts(self, model: str) -> None:
        """What a compiled block runs and moves, and what a step keeps: ours and theirs."""
        names = [
            f"{kind}/{model}"
            for kind in ("kernels_per_block", "pointwise_bytes", "activation_bytes_per_token")
        ]
        if not self.wants(*names) or not self.fits(names[0], "counts"):
            return
        start = time.monotonic()
        pair: Pair = PAIRS[model](1024, torch.float32)
        kept = [activation_bytes(contender) / contender.num_tokens for contender in pair]
        kernels, moved = zip(*(compiled_block(contender) for contender in pair), strict=True)
        least = [minimal_pointwise_bytes(contender) for contender in pair]
        ratios = [found / minimum for found, minimum in zip(moved, least, strict=True)]
        self.add(names[0], {"value": float(kernels[1]), "theirs": float(kernels[0])})
        self.add(names[1], {"value": ratios[1], "theirs": ratios[0], "mib": moved[1] / 2**20})
        self.add(names[2], {"value": kept[1], "theirs": kept[0]})
        self.last_s["counts"] = time.monotonic() - start


def in_parts(num_parts: int, arguments: list[str], json_file: Path | None) -> None:
    """Run the script once for each part at the same time, and put their rows together."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{part}.json") for part in range(num_parts)]
        command = [sys.executable, __file__, *arguments, "--parts", str(num_parts)]
        parts = [
            subprocess.Popen(
                [*command, "--part", str(part), "--json", str(file)],
            )
            for part, file in enumerate(files)
        ]
        failed = [part.args for part in parts if part.wait()]
        if failed:
            raise SystemExit(f"a part of the measurement failed: {failed[0]}")
        rows = [row for file in files for row in json.loads(file.read_text())]
    if not rows:
        raise SystemExit("no row was measured: none matches, or none fits into the time")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    """Measure, print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--json", type=Path, help="write [{name, value, goal, ok}, ...] here")
    parser.add_argument("--minutes", type=float, default=11.5, help="skip what does not fit")
    parser.add_argument("--repeats", type=int, default=5, help="3 at most for 4096 tokens")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--parts", type=int, default=min(2, cores), help="processes that share it")
    parser.add_argument("--part", type=int, help="measure this part only, 0 to PARTS - 1")
    args = parser.parse_args()
    if args.part is None:
        print(f"{'row':36s} {'value':>10s} {'goal':>10s}        (our time / theirs, or as said)")
        if args.parts > 1:
            told = ["--minutes", str(args.minutes), "--repeats", str(args.repeats)]
            in_parts(args.parts, ["--rows", *args.rows, *told], args.json)
            return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    run = Run(args.rows, args.minutes, args.repeats, args.part or 0, args.parts)
    run.everything()
    if args.parts == 1 and not run.rows and not run.skipped:
        raise SystemExit(f"no row matches {args.rows}")
    machine = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "peak_gflops_s": {dtype: speed / 1e9 for dtype, speed in run.peak.items()},
        "minutes": (time.monotonic() - run.start) / 60,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(machine), flush=True)
    if args.json:
        write_rows(args.json, (goal.row(name, value) for name, (value, goal) in run.rows.items()))


if __name__ == "__main__":
    main()
