"""Checks between ranks: who is there, clocks, right sums, latency, bandwidth, slow pairs.

Everything is bounded by a deadline: a rank that does not come is named, not waited for.
"""

from __future__ import annotations

import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

from kinodit.launch.doctor.report import Check, RankReport, Verdict
from kinodit.trainer.topology import Topology

MAX_CLOCK_WARN_S, MAX_CLOCK_FAIL_S = 2.0, 60.0
NUM_SMALL, NUM_LARGE = 20, 3
SMALL, LARGE_CPU_BYTES, LARGE_GPU_BYTES = 1, 4 << 20, 256 << 20
SLOW_PAIR = 4.0
"""A pair of ranks is slow if it takes so many times the median."""


class Meeting:
    """A store that the ranks of a job meet at, rank 0 its host.

    Raises:
        dist.DistError: rank 0 cannot be reached before the deadline.
    """

    def __init__(self, topology: Topology, host: str, port: int, deadline_s: float) -> None:
        self._topology, self._deadline_s = topology, deadline_s
        self._store = dist.TCPStore(
            host,
            port,
            is_master=topology.is_main,
            timeout=timedelta(seconds=deadline_s),
            wait_for_workers=False,
        )

    def tell(self, stage: str, report: RankReport) -> None:
        """Leave this rank's report."""
        self._store.set(f"{stage}/{report.rank}", report.to_json())

    def gather(self, stage: str) -> list[RankReport]:
        """The reports of all ranks, or of those that have one when the deadline is over."""
        keys = [f"{stage}/{rank}" for rank in range(self._topology.world_size)]
        try:
            self._store.wait(keys, timedelta(seconds=self._deadline_s))
        except dist.DistStoreError:
            keys = [key for key in keys if self._store.check([key])]
        return [RankReport.from_json(self._store.get(key).decode()) for key in keys]

    def leave(self, num_present: int) -> None:
        """Rank 0 stays until the others have read what they wanted."""
        self._store.add("left", 1)
        until_s = time.monotonic() + self._deadline_s
        while self._topology.is_main and time.monotonic() < until_s:
            if self._store.add("left", 0) >= num_present:
                return
            time.sleep(0.05)

    def join(self) -> None:
        """Make the process group of all ranks."""
        cuda = torch.cuda.is_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self._topology.rank,
            world_size=self._topology.world_size,
            timeout=timedelta(seconds=self._deadline_s),
            device_id=torch.device("cuda", self._topology.local_rank) if cuda else None,
        )


def absent(reports: list[RankReport], world_size: int) -> Check:
    """Whether every rank came."""
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    if missing:
        ranks = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        return Check("ranks", Verdict.FAIL, f"did not come: rank {ranks} of {world_size}")
    return Check("ranks", Verdict.PASS, f"all {world_size} came")


def check_network(topology: Topology, reports: list[RankReport]) -> list[Check]:
    """Checks by all ranks together. Collective.

    Raises:
        RuntimeError: a collective failed; its text names the backend's reason.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", topology.local_rank) if cuda else torch.device("cpu")
    return [
        _clocks(),
        _sums(topology, device),
        _speed(topology, device),
        _pairs(topology, device, reports),
    ]


def _clocks() -> Check:
    """The spread of the nodes' clocks: logs and file times of several nodes must be comparable."""
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64)
    first, last = now.clone(), now.clone()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    spread_s = float(last - first)
    verdict = Verdict.PASS
    if spread_s > MAX_CLOCK_WARN_S:
        verdict = Verdict.FAIL if spread_s > MAX_CLOCK_FAIL_S else Verdict.WARN
    found = "agree" if verdict is Verdict.PASS else f"differ by {spread_s:.1f} s: is NTP running?"
    return Check("clocks", verdict, found)


def _sums(topology: Topology, device: torch.device) -> Check:
    """An all-reduce gives what arithmetic says, on every rank."""
    value = torch.full((1 << 16,), float(topology.rank + 1), device=device)
    dist.all_reduce(value)
    expected = topology.world_size * (topology.world_size + 1) / 2
    if bool((value == expected).all()):
        return Check("sums", Verdict.PASS, "right")
    wrong = int((value != expected).sum())
    return Check("sums", Verdict.FAIL, f"{wrong} of {value.numel()} elements are wrong")


def _timed(device: torch.device, tensor: torch.Tensor, repeats: int) -> float:
    """Median seconds of an all-reduce of `tensor`; the same on all ranks (the slowest's)."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronise(device)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor([median(seconds[1:])], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _speed(topology: Topology, device: torch.device) -> Check:
    """Latency of the smallest all-reduce, and bus bandwidth of a large one."""
    num_bytes = LARGE_GPU_BYTES if device.type == "cuda" else LARGE_CPU_BYTES
    latency_s = _timed(device, torch.zeros(SMALL, device=device), NUM_SMALL)
    large_s = _timed(device, torch.zeros(num_bytes // 4, device=device), NUM_LARGE)
    # What each rank must send and receive in a ring, as nccl-tests counts it.
    share = 2 * (topology.world_size - 1) / topology.world_size
    bandwidth = num_bytes * share / large_s / 1e9
    found = f"all-reduce {latency_s * 1e6:.0f} us; {num_bytes >> 20} MiB at {bandwidth:.2f} GB/s"
    return Check("collectives", Verdict.PASS, found)


def _pairs(topology: Topology, device: torch.device, reports: list[RankReport]) -> Check:
    """Each rank exchanges with its neighbours; a pair far slower than the others is named."""
    num_bytes = (LARGE_GPU_BYTES if device.type == "cuda" else LARGE_CPU_BYTES) // 4
    mine = torch.zeros(topology.world_size, dtype=torch.float64)
    for parity in (0, 1):
        partner = topology.rank + (1 if topology.rank % 2 == parity else -1)
        if not 0 <= partner < topology.world_size:
            dist.barrier()
            continue
        sent = torch.zeros(num_bytes // 4, device=device)
        received = torch.empty_like(sent)
        seconds = []
        for _ in range(NUM_LARGE):
            _synchronise(device)
            start = time.perf_counter()
            operations = [
                dist.P2POp(dist.isend, sent, partner),
                dist.P2POp(dist.irecv, received, partner),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            _synchronise(device)
            seconds.append(time.perf_counter() - start)
        mine[min(topology.rank, partner)] = median(seconds)
        dist.barrier()
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    pairs = mine[:-1].tolist()
    usual = median(pairs)
    index = max(range(len(pairs)), key=pairs.__getitem__)
    if len(pairs) > 2 and pairs[index] > SLOW_PAIR * usual:
        nodes = dict.fromkeys(r.node for r in reports if r.rank in (index, index + 1))
        times = f"{pairs[index] / usual:.0f} times the median"
        found = f"ranks {index} and {index + 1} ({', '.join(nodes)}) take {times}"
        return Check("pairs", Verdict.WARN, found)
    return Check("pairs", Verdict.PASS, f"{num_bytes / usual / 1e9:.2f} GB/s each way")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
