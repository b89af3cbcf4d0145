"""Which rank am I? The only reader of the launchers' environment variables.

The same command runs as one process, under `torchrun` and under `srun`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from kinodit.models.errors import UserError
from kinodit.trainer.topology import Job, Topology

if TYPE_CHECKING:
    # Loaded where it is used: a mistake is told at once.
    import torch
    from torch.distributed import Store

DEFAULT_PORT = 29400
SCONTROL_TIMEOUT_S = 10.0


class LaunchError(UserError):
    """The launcher's environment is incomplete or contradicts itself."""


def read_topology() -> Topology:
    """The topology that torchrun or srun left in the environment; one process without them.

    Raises:
        LaunchError: some variables of a launcher are set and others are missing.
    """
    env = os.environ
    if "RANK" in env:
        source, names = "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        source, names = "srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return Topology(rank=0, world_size=1, local_rank=0, job=read_job(env, asks=True))
    missing = [name for name in names if name not in env]
    if missing:
        raise LaunchError(
            f"{source} set {names[0]} but not {', '.join(missing)}: start through torchrun or srun"
        )
    rank, world_size, local_rank = (int(env[name]) for name in names)
    # One rank's knowledge of the time limit is enough: the ranks agree on when to stop.
    job = read_job(env, asks=rank == 0)
    # Slurm writes 8(x4) for four nodes of eight, and 8(x3),4 where the last has fewer.
    per_node = env.get("LOCAL_WORLD_SIZE" if source == "torchrun" else "SLURM_TASKS_PER_NODE", "0")
    first = int(per_node.partition("(")[0].partition(",")[0])
    return Topology(rank, world_size, local_rank, job=job, ranks_per_node=first)


def launched_rank() -> int | None:
    """This process's rank, if it is one of several and knows it."""
    rank = os.environ.get("RANK", "")
    if not rank:
        rank = os.environ.get("SLURM_PROCID", "")
        if int(os.environ.get("SLURM_NTASKS", "1")) == 1:
            return None
    return int(rank) if rank.isdecimal() else None


def error_file() -> Path | None:
    """Where torchrun looks for what ended this rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def launcher_store(timeout_s: float) -> Store | None:
    """The store that torchrun keeps for its ranks, which is there before and after their group.

    Raises:
        DistError: it does not answer.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(*meeting_point(), is_master=False, timeout=timeout)
    start = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"kinodit/start-{start}", store)


def read_job(env: Mapping[str, str], *, asks: bool) -> Job:
    """The batch job of this process. `asks`: ask Slurm when it ends, if `env` does not say."""
    job_id = env.get("SLURM_JOB_ID", "")
    if not job_id.isdecimal():
        return Job()
    end_s: float | None = None
    if env.get("SLURM_JOB_END_TIME", "").isdecimal():
        end_s = float(env["SLURM_JOB_END_TIME"])
    elif asks:
        end_s = _ask_for_end(job_id)
    ends_at_s = None if end_s is None else time.monotonic() + end_s - time.time()
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    return Job(job_id, ends_at_s, int(restarts) if restarts.isdecimal() else 0)


def _ask_for_end(job_id: str) -> float | None:
    """Unix time of the job's end as the scheduler has it; None where it cannot be asked.

    Containers often lack scontrol, and a scheduler may be too busy to answer: signals still work.
    """
    try:
        shown = _scontrol("--oneliner", "show", "job", job_id)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\b", shown)
    # Slurm writes the local time of the cluster.
    return datetime.fromisoformat(found[1]).timestamp() if found else None


def node_name() -> str:
    """The name of this node: Slurm's where there is one, since names decide who is left out."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def granted_gpus() -> int:
    """How many GPUs of this node the scheduler gave the job; 0 without a scheduler."""
    count = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return int(count) if count.isdecimal() else 0


def meeting_point() -> tuple[str, int]:
    """Host and port at which rank 0 is found.

    Raises:
        LaunchError: the launcher did not say, and Slurm does not either.
    """
    _rendezvous()
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise LaunchError(
            "no MASTER_ADDR and MASTER_PORT of rank 0: start through torchrun or srun"
        ) from error


def _rendezvous() -> None:
    """Under srun, derive the address of rank 0 from the job: every task derives the same."""
    if "MASTER_ADDR" in os.environ or "SLURM_JOB_NODELIST" not in os.environ:
        return
    names = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
    first = names.split()[0]
    # Nodes need not have the names that the domain name service knows; Slurm has the address.
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", first))
    os.environ["MASTER_ADDR"] = found[1] if found else first
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(DEFAULT_PORT + job % 16384))


def _scontrol(*words: str) -> str:
    return subprocess.run(
        ["scontrol", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=SCONTROL_TIMEOUT_S,
    ).stdout


@contextmanager
def process_group(topology: Topology, timeout_s: float) -> Iterator[torch.device]:
    """Join the run's process group (NCCL, and gloo for the hosts); yields this rank's device.

    One process joins none: everything in the trainer also runs without a process group.
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", topology.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if topology.world_size == 1:
        yield device
        return
    _rendezvous()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method="env://",
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if cuda else None,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def pretended_group(rank: int, world_size: int) -> Iterator[None]:
    """A process group of any size whose messages go nowhere; none for one process.

    Raises:
        UserError: this process is in a process group already.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise UserError("a dry run needs a process of its own: this one is in a process group")
    if world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
