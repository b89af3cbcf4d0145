"""What a cluster can do: constants of data sheets, and the shares of them that work reaches.

Nothing here was measured by this project. Peaks, memory and links are NVIDIA's data sheets of A100
(SXM 80 GB), H100 (SXM), H200, B200 (HGX) and L40S, dense numbers without sparsity. Shares are
assumptions; a plan prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kinodit.models.errors import ConfigError
from kinodit.trainer.peak import PEAK_TFLOPS_BF16

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    flops_s:  dense bf16 peak; other formats are taken at half of it, as for TF32
    memory_s: bytes per second to its memory
    link_s:   bytes per second, one direction, to the others of its node (NVLink, or PCIe)
    host_s:   bytes per second, one direction, to host memory
    """

    name: str
    flops_s: float
    memory_s: float
    link_s: float
    host_s: float


def _gpu(name: str, memory_gb_s: float, link_gb_s: float, host_gb_s: float) -> Gpu:
    peak = PEAK_TFLOPS_BF16[name] * 1e12
    return Gpu(name, peak, memory_gb_s * 1e9, link_gb_s * 1e9, host_gb_s * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100", 2039, 300, 32),
        _gpu("H100", 3350, 450, 64),
        _gpu("H200", 4800, 450, 64),
        _gpu("B200", 8000, 900, 64),
        _gpu("L40S", 864, 32, 32),
    )
}
"""By name. Links are half of the bidirectional NVLink figure; PCIe 4 and 5 x16 to the host."""

INTERCONNECTS = {
    "hdr200": 25.0,
    "ndr400": 50.0,
    "xdr800": 100.0,
    "ethernet100": 1.5625,
}
"""Between nodes, GB/s per GPU, one direction: an InfiniBand port of 200, 400 or 800 Gb/s for each
GPU (so has a p5 instance of AWS: 3,200 Gb/s of EFA for eight), or 100 Gb/s Ethernet for eight."""


@dataclass(frozen=True)
class Shares:
    """Which part of a peak work reaches: assumptions, not measurements.

    products:  matrix products, of the arithmetic peak
    attention: flash attention, likewise; FlashAttention-2 on H100 is at 35 to 40 % (Shah et al.,
               "FlashAttention-3", arXiv 2407.08608, figure 5)
    memory:    pointwise work, of memory bandwidth
    links:     collectives, of a link's bandwidth
    """

    products: float = 0.65
    attention: float = 0.38
    memory: float = 0.75
    links: float = 0.75


LATENCY_S = 2e-5
"""Seconds to start a collective: assumed."""

MADE_TO_MOVED = 3
"""Bytes moved for each byte of a tensor that is made, written once and read twice: assumed."""


@dataclass(frozen=True)
class Cluster:
    """`num_gpus` of a kind in nodes of `per_node`.

    memory:    bytes of each GPU
    reserved:  bytes of it that a run cannot have: CUDA's context, NCCL's buffers, and what the
               allocator loses to fragments. An assumption
    network_s: bytes per second, one direction, of each GPU to other nodes
    """

    gpu: Gpu
    num_gpus: int
    memory: float
    network_s: float
    per_node: int = 8
    reserved: float = 4 * GIB
    shares: Shares = Shares()

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory - self.reserved

    def bandwidth(self, span: int) -> float:
        """Bytes per second of a collective whose ranks lie within `span` neighbouring ranks."""
        link = self.gpu.link_s if span <= self.per_node else min(self.network_s, self.gpu.link_s)
        return link * self.shares.links

    def peak(self, item: int) -> float:
        """FLOP/s of one GPU for numbers of `item` bytes."""
        return self.gpu.flops_s if item == 2 else self.gpu.flops_s / 2


def build_cluster(
    gpu: str,
    num_gpus: int,
    memory_gib: float,
    interconnect: str,
    per_node: int,
    reserved_gib: float,
) -> Cluster:
    """The cluster that a command line names.

    Raises:
        ConfigError: an unknown name, or a number that cannot be.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: there is {', '.join(GPUS)}")
    if num_gpus < 1 or per_node < 1:
        raise ConfigError(f"--gpus {num_gpus}, --gpus-per-node {per_node}: must be at least 1")
    if not 0 <= reserved_gib < memory_gib:
        raise ConfigError(
            f"--gpu-memory {memory_gib:g} with --reserve {reserved_gib:g} GiB: what is reserved "
            "must be less than there is"
        )
    made = Cluster(GPUS[gpu], num_gpus, memory_gib * GIB, 0.0, per_node, reserved_gib * GIB)
    return replace(made, network_s=1e9 * _gigabytes(interconnect))


def _gigabytes(interconnect: str) -> float:
    if interconnect in INTERCONNECTS:
        return INTERCONNECTS[interconnect]
    try:
        value = float(interconnect)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(
            f"--interconnect {interconnect}: a number of GB/s per GPU, or one of "
            f"{', '.join(INTERCONNECTS)}"
        )
    return value
