"""Real processes that talk over gloo, started once and used for many cases.

Ranks are forked from a server that has all modules loaded: a group of four starts in a fraction of
a second. It is started anew when there are many of the process groups that cases made, which stay
with a process: each has threads that wake a hundred times a second, or memory on the device. A case
is a module-level function
`case(rank, world_size, *args)`; what it returns comes back by rank, and what it raises is raised
here as `RankError` with the rank's traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

TIMEOUT_S = 120
COMPILING_S = 1200
"""Beside it, where ranks compile: minutes for each on a machine that has other work."""
PRELOADED = [
    "torch",
    "torch.distributed",
    "kinodit.trainer.certify.trace",
    "kinodit.trainer.engine.megatron",
]
"""Imported once, if it is installed, before ranks are forked: it takes longer than most cases."""

MAX_THREADS = 100
"""A process that has more after a case ends with it. Destroying the groups instead would leave
caches of meshes behind, in torch and in DeepSpeed, that name groups which are gone."""


def _serve(
    rank: int,
    world_size: int,
    store: str,
    paths: tuple[str, ...],
    device: str,
    timeout_s: float,
    pipe: Connection,
) -> None:
    """Body of one rank: join the group, then run cases until told to stop."""
    sys.path[:0] = [folder for folder in paths if folder not in sys.path]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    is_last = False
    while not is_last and (request := pipe.recv()) is not None:
        module, name, args = request
        try:
            case = getattr(importlib.import_module(module), name)
            result = case(rank, world_size, *args)
            is_last = len(list(Path("/proc/self/task").iterdir())) > MAX_THREADS
            pipe.send((True, result, is_last))
        except BaseException:  # noqa: BLE001 - whatever a case raises belongs to the caller
            pipe.send((False, traceback.format_exc(), True))
    dist.destroy_process_group()


class RankError(RuntimeError):
    """A case failed on some rank; the message is its traceback."""


class Ranks:
    """A group of `world_size` processes that talk over gloo, or over NCCL with a device each."""

    body: ClassVar[Callable[..., None]] = staticmethod(_serve)
    """What each of them runs."""
    preloaded: ClassVar[list[str]] = PRELOADED

    def __init__(
        self,
        world_size: int,
        paths: tuple[str, ...] = (),
        device: str = "cpu",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`paths` are put before the processes' `sys.path`. device: "cpu" or "cuda".

        timeout_s: how long a rank may wait for the others, and `run` for an answer
        """
        self.world_size = world_size
        self._timeout_s = timeout_s
        self._paths, self._device = paths, device
        self._pipes: list[Connection] = []
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.preloaded)
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes = []
        self._processes: list[multiprocessing.context.ForkServerProcess] = []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=self.body,
                args=(
                    rank,
                    self.world_size,
                    store,
                    self._paths,
                    self._device,
                    self._timeout_s,
                    theirs,
                ),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """`case(rank, world_size, *args)` on every rank; the results by rank.

        Raises:
            RankError: a rank raised or died. The others may wait for it in vain, so the group is
                closed.
            TimeoutError: some rank did not answer.
        """
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case.__module__, case.__qualname__, args))
        results: dict[int, Any] = {}
        ended = False
        while len(results) < self.world_size:
            waiting = {pipe: r for r, pipe in enumerate(self._pipes) if r not in results}
            answered = multiprocessing.connection.wait(list(waiting), self._timeout_s)
            if not answered:
                self.close()
                missing = sorted(waiting.values())
                raise TimeoutError(f"ranks {missing} did not answer within {self._timeout_s} s")
            for pipe in self._pipes:
                if pipe not in answered:
                    continue
                rank = waiting[pipe]
                try:
                    ok, value, is_last = pipe.recv()
                except EOFError:
                    ok, value, is_last = False, "it died", True
                ended |= is_last
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {self.world_size}:\n{value}")
                results[rank] = value
        if ended:
            self.close()
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Stop the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._pipes, self._processes = [], []
        self._folder.cleanup()
