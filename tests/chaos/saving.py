"""A run of two ranks that does nothing but save: what the kill points are tried on."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

WORLD_SIZE = 2
LAST_STEP = 4
SHAPES = {"model/w": (600, 16), "optim/exp_avg/w": (600, 16), "ema/main/w": (5,)}
ENDED, FAILED = 0, 3


@dataclass(frozen=True)
class Attempt:
    """One start. faults: as in the environment's variable."""

    run_dir: Path
    mode: str
    faults: str = ""
    deadline_s: float = 120.0


def value_at(step: int, name: str) -> torch.Tensor:
    """What entry `name` is after `step` steps."""
    return torch.full(SHAPES[name], float(step * 1000 + len(name)))


def _rank(rank: int, store: str, attempt: Attempt, paths: list[str]) -> None:
    sys.path[:] = paths
    try:
        _save_every_step(rank, store, attempt)
    except BaseException:  # noqa: BLE001 - the exit code is all that the test asks for
        traceback.print_exc()
        os._exit(FAILED)
    os._exit(ENDED)


def _save_every_step(rank: int, store: str, attempt: Attempt) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    from kinodit.trainer import checkpoint, faults
    from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
    from kinodit.trainer.state import TrainState

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, WORLD_SIZE),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=attempt.deadline_s),
    )
    mesh = build_mesh(ParallelConfig(), WORLD_SIZE, rank, torch.device("cpu"))
    assert mesh.device_mesh is not None
    parts = mesh.device_mesh["dp_shard_cp"]
    tensors = {
        name: distribute_tensor(value_at(0, name), parts, [Shard(0)], src_data_rank=None)
        for name in SHAPES
    }
    faults.arm(faults.parse_faults(attempt.faults), rank)
    mesh.from_main(lambda: checkpoint.recover(attempt.run_dir))
    restored = checkpoint.restore(attempt.run_dir, tensors, mesh)
    state = restored.state if restored else TrainState(0, 0, 0, "plan")
    for name, tensor in tensors.items():
        assert torch.equal(tensor.full_tensor(), value_at(state.step, name)), name
    config = checkpoint.CheckpointConfig(keep_last=1, mode=attempt.mode)  # type: ignore[arg-type]
    saver = checkpoint.Saver(attempt.run_dir, config, mesh, {}, attempt.deadline_s)
    for step in range(state.step + 1, LAST_STEP + 1):
        saver.wait_for_copy()
        for name, tensor in tensors.items():
            whole = distribute_tensor(value_at(step, name), parts, [Shard(0)], src_data_rank=None)
            tensor.to_local().copy_(whole.to_local())
        saver.save(TrainState(step, step, step, "plan"), tensors)
    saver.drain()
    assert saver.last is not None and not saver.last.failure, saver.last
    saver.close()


def start(attempt: Attempt) -> tuple[list[int | None], float]:
    """Run both ranks to their ends; (exit codes, None for a rank that hung; seconds it took)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint"]
    )
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(rank, store, attempt, list(sys.path)))
            for rank in range(WORLD_SIZE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, began_s + 2 * attempt.deadline_s - time.monotonic()))
        codes = [process.exitcode for process in processes]
        took_s = time.monotonic() - began_s
        for process in processes:
            process.kill()
            process.join()
    return codes, took_s
