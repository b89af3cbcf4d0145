"""Which rank am I? The only reader of the launchers' environment variables.

The same command runs as one process, under `torchrun` and under `srun`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from kinodit.models.errors import UserError
from kinodit.trainer.topology import Topology

DEFAULT_PORT = 29400


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
        return Topology(rank=0, world_size=1, local_rank=0)
    missing = [name for name in names if name not in env]
    if missing:
        raise LaunchError(
            f"{source} set {names[0]} but not {', '.join(missing)}: start through torchrun or srun"
        )
    rank, world_size, local_rank = (int(env[name]) for name in names)
    return Topology(rank=rank, world_size=world_size, local_rank=local_rank)


def _rendezvous() -> None:
    """Under srun, derive the address of rank 0 from the job: every task derives the same."""
    if "MASTER_ADDR" in os.environ or "SLURM_JOB_NODELIST" not in os.environ:
        return
    names = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    os.environ["MASTER_ADDR"] = names.stdout.split()[0]
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(DEFAULT_PORT + job % 16384))


@contextmanager
def process_group(topology: Topology, timeout_s: float) -> Iterator[torch.device]:
    """Join the run's process group (NCCL, and gloo for the hosts); yields this rank's device.

    One process joins none: everything in the trainer also runs without a process group.
    """
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
