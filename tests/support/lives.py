"""Ranks that may be killed, stopped and hung: processes of their own for each start of a run.

They are forked from a server that has torch and the trainer loaded, so that a start takes a
fraction of a second, and live under a watchdog each, as `kinodit train` makes them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tests.support.ranks import ROOT

JOIN_TIMEOUT_S = 300


@dataclass(frozen=True)
class Start:
    """One start of a run.

    faults: as KINODIT_FAULTS has them; job, attempt: of the batch job; wall_s: before the whole
    group is ended from outside, which `Lives.run` reports as a hang
    """

    recipe: Path
    overrides: tuple[str, ...] = ()
    faults: str = ""
    world_size: int = 2
    job: str = "1"
    attempt: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    wall_s: float = 300.0


@dataclass(frozen=True)
class End:
    """codes: exit codes by rank, minus the signal for one that a signal ended; None: it hung."""

    codes: list[int | None]
    logs: list[str]
    seconds: float


def _live(rank: int, start: Start, store: str, log: str) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    os.environ.update(start.environment)
    os.environ["KINODIT_FAULTS"] = start.faults
    from kinodit.trainer.resilience.watchdog import fork_watched

    code = fork_watched()
    if code is None:
        code = _train(rank, start, store)
        sys.stderr.flush()
    os._exit(code)


def _train(rank: int, start: Start, store: str) -> int:
    import torch
    import torch.distributed as dist

    from kinodit.data.fork_server import fork_early
    from kinodit.models.errors import UserError
    from kinodit.trainer.config import load_config
    from kinodit.trainer.resilience.signals import Signals
    from kinodit.trainer.run import train
    from kinodit.trainer.topology import Job, Topology

    torch.set_num_threads(1)
    fork_early()
    try:
        with Signals() as signals:
            if start.world_size > 1:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, start.world_size),
                    rank=rank,
                    world_size=start.world_size,
                    timeout=timedelta(seconds=JOIN_TIMEOUT_S),
                )
            job = Job(start.job, num_restarts=start.attempt)
            topology = Topology(rank, start.world_size, rank, job=job)
            config = load_config(start.recipe, start.overrides)
            train(config, topology, torch.device("cpu"), sys.stderr, signals)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BaseException:  # noqa: BLE001 - a rank says why it ends, whatever it is
        traceback.print_exc()
        return 1
    return 0


class Lives:
    """Starts groups of ranks, one after the other."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "kinodit.trainer.run"])
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def run(self, start: Start) -> End:
        """One start, to the end of its last rank."""
        self._count += 1
        base = Path(self._folder.name) / str(self._count)
        logs = [Path(f"{base}-{rank}.log") for rank in range(start.world_size)]
        ranks = [
            self._context.Process(target=_live, args=(rank, start, f"{base}.store", str(log)))
            for rank, log in enumerate(logs)
        ]
        began_s = time.monotonic()
        for rank in ranks:
            rank.start()
        codes: list[int | None] = []
        for rank in ranks:
            rank.join(max(0.0, began_s + start.wall_s - time.monotonic()))
            codes.append(rank.exitcode)
        seconds = time.monotonic() - began_s
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
        texts = [log.read_text() if log.exists() else "" for log in logs]
        return End(codes, texts, seconds)

    def restart(self, start: Start, max_starts: int) -> list[End]:
        """Starts until one ends well; the ends of all. The faults strike as `once` says."""
        ends: list[End] = []
        while not ends or any(ends[-1].codes):
            assert len(ends) < max_starts, [end.codes for end in ends] + ends[-1].logs
            ends.append(self.run(start))
        return ends

    def close(self) -> None:
        """Remove the logs."""
        self._folder.cleanup()


def describe(ends: Sequence[End]) -> str:
    """What a failed test shows."""
    return "\n".join(f"{end.codes}\n" + "\n".join(end.logs) for end in ends)
