"""What saving costs a run, and what verifying costs a load.

    python benchmarks/checkpoint.py [--mib 200] [--repeats 5] [--folder DIR] [--json FILE]

One process, a state of that many MiB in tensors like a transformer's. In the same run, interleaved:
a synchronous save, a plain copy of the same bytes, an asynchronous save beside steps that read the
state as a forward and backward do, and loads with and without verification, of files that are not
in the page cache (as on another node, or after one was replaced) and of files that are. The best of
the repeats counts, since neighbours on the machine only ever add time.

stall_over_sync:  time that an asynchronous save holds training up over that of a synchronous one
stall_ms_200mb:   that time for 200 MiB
stall_over_copy:  that time over a plain copy of the same bytes
verify_over_load: what verification adds to a load from the disk, as a share of it

What it adds to a load from the page cache is printed, too. It has no goal: sha256 takes a core
twice as long as such a load does, so that the share depends on how many cores are idle.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from goals import Row, write_rows

from kinodit.trainer import checkpoint
from kinodit.trainer.checkpoint.shards import read_shards
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.state import TrainState

MESH = Mesh(torch.device("cpu"))
GOALS = {
    "stall_over_sync": 0.05,
    "stall_ms_200mb": 50.0,
    "stall_over_copy": 2.0,
    "verify_over_load": 0.2,
}


def state_of(mib: int) -> dict[str, torch.Tensor]:
    """Matrices of 4 MiB and vectors of 4 KiB, random."""
    source = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(max(1, mib // 4)):
        tensors[f"model/blocks.{index}.weight"] = torch.randn(1024, 1024, generator=source)
        tensors[f"model/blocks.{index}.bias"] = torch.randn(1024, generator=source)
    return tensors


def saver_of(folder: Path, mode: str) -> checkpoint.Saver:
    config = checkpoint.CheckpointConfig(mode=mode, keep_last=0)
    return checkpoint.Saver(folder, config, MESH, {})


def sync_s(folder: Path, tensors: dict[str, torch.Tensor], step: int) -> float:
    saver = saver_of(folder, "sync")
    start = time.perf_counter()
    (outcome,) = saver.save(TrainState(step, 0, 0, ""), tensors)
    elapsed = time.perf_counter() - start
    assert not outcome.failure, outcome.failure
    saver.close()
    return elapsed


def stall_s(saver: checkpoint.Saver, tensors: dict[str, torch.Tensor], step: int) -> float:
    """Beside a forward and backward that take at least as long as any that fill this memory."""
    before = saver.stall_s
    saver.save(TrainState(step, 0, 0, ""), tensors)
    for _ in range(3):
        for tensor in tensors.values():
            if tensor.ndim == 2:
                tensor[:64] @ tensor
    saver.wait_for_copy()
    (outcome,) = saver.drain()
    assert not outcome.failure, outcome.failure
    return saver.stall_s - before


def copy_s(tensors: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    for name, tensor in tensors.items():
        into[name].copy_(tensor)
    return time.perf_counter() - start


def load_s(path: Path, tensors: dict[str, torch.Tensor], *, verified: bool) -> float:
    start = time.perf_counter()
    if verified:
        checkpoint.load(path, tensors, MESH)
    else:
        read_shards(path, tensors, alone=True)
    return time.perf_counter() - start


def evict(path: Path) -> None:
    """Drop a checkpoint's files from the page cache; without effect on a file system in memory."""
    for file in path.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, mib: int, repeats: int) -> dict[str, float]:
    """Seconds, the best of `repeats`."""
    tensors = state_of(mib)
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    copy_s(tensors, target)
    times: dict[str, list[float]] = {}
    saver = saver_of(folder, "async")
    stall_s(saver, tensors, 1)  # makes the buffers
    for repeat in range(2, repeats + 2):
        shutil.rmtree(folder / "checkpoints")
        found = {
            "sync": sync_s(folder, tensors, repeat),
            "stall": stall_s(saver, tensors, 1000 + repeat),
            "copy": copy_s(tensors, target),
        }
        path = checkpoint.find_checkpoints(folder)[-1]
        for name, verified in (("load", False), ("verified load", True)):
            evict(path)
            found[name] = load_s(path, target, verified=verified)
            found[f"cached {name}"] = load_s(path, target, verified=verified)
        for name, value in found.items():
            times.setdefault(name, []).append(value)
    saver.close()
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors.items())
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        best = measure(Path(folder), args.mib, args.repeats)
    for name, seconds in best.items():
        print(f"{name:<20} {1000 * seconds:9.1f} ms")
    values = {
        "stall_over_sync": best["stall"] / best["sync"],
        "stall_ms_200mb": 1000 * best["stall"] * 200 / args.mib,
        "stall_over_copy": best["stall"] / best["copy"],
        "verify_over_load": (best["verified load"] - best["load"]) / best["load"],
    }
    cached = best["cached verified load"] / best["cached load"] - 1
    print(f"{'verify_over_load':<16} {cached:9.3f}  from the page cache, {os.cpu_count()} cores")
    rows = [Row.at_most(name, value, GOALS[name]) for name, value in values.items()]
    for row in rows:
        print(f"{row.name:<16} {row.value:9.3f}  goal {row.goal:g}  {row.ok}")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
