"""The choice of an engine, and each one's settings; no library is imported for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """How steps are executed; none of it changes the loss curve.

    name:          which engine shards, reduces and updates: a key of ENGINES
    compile:       torch.compile each block
    micro_batches: forward passes that a rank's packs are merged into; 0: one for each pack
    """

    name: str = "native"
    compile: bool = False
    micro_batches: int = 0

    def __post_init__(self) -> None:
        if self.micro_batches < 0:
            raise ConfigError(f"engine.micro_batches={self.micro_batches}: must not be negative")


@dataclass(frozen=True)
class NativeConfig(EngineConfig):
    """Plain torch: FSDP2, tensor parallelism by DTensors."""

    name: Literal["native"] = "native"


@dataclass(frozen=True)
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054) over the dp_shard and cp ranks.

    stage:             what is partitioned: 1 optimizer state, 2 gradients as well, 3 parameters as
                       well
    hpz:               ranks within which stage 3 keeps a second copy of the parameters, so that the
                       backward gathers them nearby (ZeRO++, arXiv 2306.10209, section 3.2); 1: none
    offload_optimizer: where optimizer state lives; off the device, updates run on the host
    offload_params:    where the partitions of parameters live (stage 3)
    nvme_path:         folder on a disk for what is offloaded to nvme; nothing stays there
    megatron:          take process groups and linears from megatron-core
    extra:             further keys of DeepSpeed's own JSON config; none that follow from the recipe
    """

    name: Literal["deepspeed"] = "deepspeed"
    stage: int = 2
    hpz: int = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str = ""
    megatron: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"engine.stage={self.stage}: ZeRO has the stages 1, 2 and 3")
        if self.hpz < 1:
            raise ConfigError(f"engine.hpz={self.hpz}: must be at least 1")


@dataclass(frozen=True)
class MegatronConfig(EngineConfig):
    """megatron-core's process groups and linears, FSDP2 over the data-parallel ranks.

    sequence_parallel: whether tp ranks have tokens of their own between matrices
    data_parallel:     who shards over the dp_shard and cp ranks: FSDP2, parameters and gradients as
                       well, or megatron-core's distributed optimizer, optimizer state alone
    overlap:           distributed optimizer: reduce buckets of gradients while the backward goes
                       on, and gather updated parameters while the next forward does
    bucket_numel:      distributed optimizer: numbers in a bucket, about; 0: megatron-core's rule
    linears:           whose kernels compute products; TransformerEngine's need CUDA, and take
                       precision.float8=tensorwise
    attention:         whose kernels compute attention within a rank: the model's own, or
                       TransformerEngine's, which need CUDA; cp ranks exchange heads either way
    norms:             whose kernels compute norms that have weights, and turn queries and keys:
                       torch's, one by one, or TransformerEngine's, which need CUDA
    experts:           whose kernels compute products of experts: torch's, or those of the
                       grouped_gemm that megatron-core uses, which need CUDA
    dispatcher:        who takes tokens to experts that parallel.ep deals out: the trainer's own
                       exchange, megatron-core's alltoall dispatcher, or its flex dispatcher, whose
                       kernels are DeepEP's and need CUDA
    """

    name: Literal["megatron"] = "megatron"
    sequence_parallel: bool = True
    data_parallel: Literal["fsdp2", "distributed_optimizer"] = "fsdp2"
    overlap: bool = True
    bucket_numel: int = 0
    linears: Literal["core", "transformer_engine"] = "core"
    attention: Literal["own", "transformer_engine"] = "own"
    norms: Literal["own", "transformer_engine"] = "own"
    experts: Literal["own", "grouped_gemm"] = "own"
    dispatcher: Literal["own", "alltoall", "flex"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bucket_numel < 0:
            raise ConfigError(f"engine.bucket_numel={self.bucket_numel}: must not be negative")


ENGINES: Mapping[str, type[EngineConfig]] = {
    "native": NativeConfig,
    "deepspeed": DeepSpeedConfig,
    "megatron": MegatronConfig,
}
"""Engines by the name that a recipe gives them."""


def megatron_part(engine: EngineConfig) -> MegatronConfig | None:
    """What an engine takes from megatron-core; None: nothing."""
    if isinstance(engine, MegatronConfig):
        return engine
    return MegatronConfig() if isinstance(engine, DeepSpeedConfig) and engine.megatron else None
