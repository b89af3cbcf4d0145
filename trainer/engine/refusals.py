"""Which combinations an engine cannot do, known before anything is allocated."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from dataclasses import dataclass

from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.trainer.engine.config import (
    DeepSpeedConfig,
    EngineConfig,
    MegatronConfig,
)
from kinodit.trainer.engine.zero_config import conflict
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.float8 import float8_refusal
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig


@dataclass(frozen=True)
class Wish:
    """What a recipe asks of its engine.

    world_size: processes; device: "cpu" or "cuda", and then its compute capability
    elsewhere:  whether it is for another machine, whose kernels are taken to be there
    """

    engine: EngineConfig
    optim: OptimConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    remat: RematConfig
    world_size: int = 1
    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    elsewhere: bool = False


def refusal(wish: Wish) -> str:
    """Why the wish cannot be met, and what to change; "" if it can. Pure."""
    unmet = float8_refusal(wish.precision, wish.device, wish.capability, _products_of(wish.engine))
    if unmet:
        return unmet
    if isinstance(wish.engine, DeepSpeedConfig):
        return _of_deepspeed(wish.engine, wish)
    if isinstance(wish.engine, MegatronConfig):
        return _of_megatron(wish.engine, wish)
    return ""


def check_wish(wish: Wish) -> None:
    """Refuse what cannot work, and a library that is not installed.

    Raises:
        ConfigError: with the reason.
        MissingExtraError: with how to get it.
    """
    reason = refusal(wish)
    if reason:
        raise ConfigError(reason)
    check_library(wish.engine.name)
    if isinstance(wish.engine, DeepSpeedConfig) and wish.engine.megatron:
        check_library("megatron", "engine.megatron=true")


def check_library(name: str, asked: str = "") -> None:
    """Refuse an engine whose library is not installed. asked: what in the recipe, for the message.

    Raises:
        MissingExtraError: with how to get it.
    """
    if is_missing(name):
        raise MissingExtraError(LIBRARIES[name][1], name, asked or f"engine.name={name}")


def is_missing(name: str) -> bool:
    """Whether the library behind the engine `name` is not installed."""
    known = LIBRARIES.get(name)
    return known is not None and importlib.util.find_spec(known[0]) is None


def _products_of(engine: EngineConfig) -> str:
    """Whose kernels multiply: the engine, or the library that it leaves them to."""
    return engine.linears if isinstance(engine, MegatronConfig) else engine.name


LIBRARIES = {
    "deepspeed": ("deepspeed", "DeepSpeed"),
    "megatron": ("megatron", "megatron-core"),
}
"""Engine -> (module, library) that it needs; the extra is called like the engine."""


def _of_deepspeed(engine: DeepSpeedConfig, wish: Wish) -> str:
    parallel, precision = wish.parallel, wish.precision
    if engine.stage == 0:
        why = "that is plain data parallelism, which the native engine does"
        if precision.compute == "bfloat16":
            why = (
                "in bfloat16 DeepSpeed then updates by another rule, and the loss is off by a "
                "tenth within ten steps"
            )
        return (
            f"engine.stage=0: {why}; set engine.stage to 1, 2 or 3, or engine.name=native with "
            "parallel.dp_replicate"
        )
    if parallel.dp_replicate > 1:
        return (
            f"engine.name=deepspeed with parallel.dp_replicate={parallel.dp_replicate}: ZeRO "
            "partitions over all data-parallel ranks; set parallel.dp_replicate=1 (engine.hpz "
            "keeps gathers of stage 3 inside a node)"
        )
    if parallel.cpu_offload:
        return (
            "parallel.cpu_offload=true moves FSDP2's parameters; with engine.name=deepspeed set "
            "engine.offload_optimizer or engine.offload_params instead"
        )
    if engine.compile:
        return (
            "engine.compile=true with engine.name=deepspeed: ZeRO's hooks inside blocks break the "
            "compiled graph; set engine.compile=false, or engine.name=native"
        )
    if wish.optim.name != "adamw":
        return (
            f"optim.name={wish.optim.name} with engine.name=deepspeed: ZeRO updates flat "
            "partitions, in which a matrix has no rows and columns, and keeps two moments of each; "
            "set optim.name=adamw, or engine.name=native"
        )
    return _of_partitions(engine, wish)


def _of_partitions(engine: DeepSpeedConfig, wish: Wish) -> str:
    if engine.stage < 3:
        for key, value in (("hpz", engine.hpz > 1), ("offload_params", _offloads_params(engine))):
            if value:
                return (
                    f"engine.{key}={getattr(engine, key)} with engine.stage={engine.stage}: only "
                    "stage 3 partitions parameters; set engine.stage=3"
                )
    _, shard = wish.parallel.resolve(wish.world_size)
    num_ranks = shard * wish.parallel.cp
    if engine.hpz > 1 and wish.parallel.tp > 1:
        return (
            f"engine.hpz={engine.hpz} with parallel.tp={wish.parallel.tp}: DeepSpeed keeps second "
            "copies among neighbouring ranks, and those are tp ranks; set engine.hpz=1"
        )
    if engine.hpz > 1 and wish.parallel.ep > 1:
        return (
            f"engine.hpz={engine.hpz} with parallel.ep={wish.parallel.ep}: DeepSpeed keeps second "
            "copies among neighbouring ranks, which have different experts; set engine.hpz=1"
        )
    if num_ranks % engine.hpz:
        return (
            f"engine.hpz={engine.hpz} does not divide the {num_ranks} ranks that parameters are "
            "partitioned over (parallel.dp_shard x cp): set engine.hpz to a divisor of it, or to 1"
        )
    on_disk = "nvme" in (engine.offload_optimizer, engine.offload_params)
    if on_disk and not engine.nvme_path:
        return (
            "engine.offload_optimizer or engine.offload_params=nvme without a folder: set "
            "engine.nvme_path to one on a disk of the node"
        )
    if engine.nvme_path and not on_disk:
        return (
            f"engine.nvme_path={engine.nvme_path}, but nothing is offloaded there: set "
            "engine.offload_optimizer=nvme, or leave it out"
        )
    return conflict(engine, wish.precision) or _of_dealt_experts(engine, wish.parallel.ep)


def _of_dealt_experts(engine: DeepSpeedConfig, ep: int) -> str:
    key = "contiguous_gradients"
    if ep == 1 or engine.stage == 3 or engine.extra.get("zero_optimization", {}).get(key, True):
        return ""
    return (
        f"engine.extra.zero_optimization.{key}=false with parallel.ep={ep}: DeepSpeed then sums "
        "all gradients over all data-parallel ranks, which have different experts; leave it out"
    )


def _offloads_params(engine: DeepSpeedConfig) -> bool:
    return engine.offload_params != "none"


def _of_megatron(engine: MegatronConfig, wish: Wish) -> str:
    if engine.compile:
        return (
            "engine.compile=true with engine.name=megatron: its linears are kernels of their own "
            "that a compiled graph breaks at; set engine.compile=false, or engine.name=native"
        )
    for key, other in OTHER_KERNELS.items():
        if getattr(engine, key) != other and not wish.elsewhere:
            reason = _of_kernels(wish, engine, key, other)
            if reason:
                return reason
    if engine.attention == "transformer_engine" and wish.parallel.ring > 1:
        return (
            f"engine.attention=transformer_engine with parallel.ring={wish.parallel.ring}: parts "
            "of a ring are put together by the log-sum-exp of each, which TransformerEngine keeps "
            "to itself; set parallel.ring=1 (heads are exchanged), or engine.attention=own"
        )
    if engine.dispatcher != "own":
        reason = _of_dispatcher(engine, wish)
        if reason:
            return reason
    if engine.data_parallel == "distributed_optimizer":
        reason = _of_distributed_optimizer(engine, wish)
        if reason:
            return reason
    elif engine.bucket_numel or not engine.overlap:
        return (
            "engine.bucket_numel and engine.overlap with engine.data_parallel=fsdp2, which has no "
            "buckets and always overlaps: leave them out, or set "
            "engine.data_parallel=distributed_optimizer"
        )
    is_recomputed = wish.remat.mode not in ("none", "offload")
    if engine.linears == "transformer_engine" and wish.precision.float8 != "none" and is_recomputed:
        return (
            f"engine.linears=transformer_engine with precision.float8={wish.precision.float8} and "
            f"remat.mode={wish.remat.mode}: what is computed again in the backward would not be in "
            "float8; set remat.mode to none or offload, or precision.float8=none"
        )
    return ""


def _of_dispatcher(engine: MegatronConfig, wish: Wish) -> str:
    asked = f"engine.dispatcher={engine.dispatcher}"
    if wish.parallel.ep == 1:
        return (
            f"{asked} with parallel.ep=1: every rank has all experts, and nothing is dispatched; "
            "set parallel.ep, or engine.dispatcher=own"
        )
    if engine.dispatcher == "flex" and not wish.elsewhere:
        return _of_kernels(wish, engine, "dispatcher", "own")
    return ""


def _of_distributed_optimizer(engine: MegatronConfig, wish: Wish) -> str:
    asked = f"engine.data_parallel={engine.data_parallel}"
    if wish.parallel.dp_replicate > 1:
        return (
            f"{asked} with parallel.dp_replicate={wish.parallel.dp_replicate}: it partitions over "
            "all data-parallel ranks; set parallel.dp_replicate=1, or engine.data_parallel=fsdp2"
        )
    if wish.parallel.ep > 1:
        return (
            f"{asked} with parallel.ep={wish.parallel.ep}: its one buffer is summed over all "
            "data-parallel ranks, which have different experts; set parallel.ep=1, or "
            "engine.data_parallel=fsdp2"
        )
    if wish.parallel.cpu_offload:
        return (
            f"{asked} with parallel.cpu_offload=true, which moves FSDP2's parameters: set "
            "parallel.cpu_offload=false, or engine.data_parallel=fsdp2"
        )
    if wish.optim.name != "adamw":
        return (
            f"optim.name={wish.optim.name} with {asked}: it updates flat stretches, in which a "
            "matrix has no rows and columns; set optim.name=adamw, or engine.data_parallel=fsdp2"
        )
    if wish.precision.reduce == "bfloat16":
        return (
            f"precision.reduce=bfloat16 with {asked}: its buckets add micro-batches up in the "
            "format of its messages, which would lose small gradients; set "
            "precision.reduce=float32, or engine.data_parallel=fsdp2"
        )
    return ""


def _of_kernels(wish: Wish, engine: MegatronConfig, key: str, other: str) -> str:
    found = KERNELS[getattr(engine, key)]
    module, library = found.module, found.library
    asked, instead = f"engine.{key}={getattr(engine, key)}", f"engine.{key}={other}"
    if wish.device != "cuda":
        return f"{asked} needs a CUDA device, found {wish.device}: set {instead}"
    if wish.precision.params == "float64":
        return f"{asked} has no kernels for precision.params=float64: set {instead}"
    if key != "linears" and wish.precision.compute != "bfloat16":
        return (
            f"{asked} has kernels for precision.compute=bfloat16, found "
            f"{wish.precision.compute}: set that, or {instead}"
        )
    if importlib.util.find_spec(module) is None:
        return (
            f"{asked} needs {library}, which is not installed: pip install "
            f"{found.source} in an image with CUDA, or set {instead}"
        )
    version = _version(module)
    if version and not found.least <= _numbers(version) < found.most:
        return (
            f"{asked} is written against another release of {library} than {version}: pip install "
            f"{found.source}, or set {instead}"
        )
    return ""


def _version(distribution: str) -> str:
    """Of what is installed; "" if it was put there by hand."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The first two of a version: 2.11.0+abc -> (2, 11)."""
    return tuple(map(int, version.split(".")[:2]))


@dataclass(frozen=True)
class Kernels:
    """Where kernels come from.

    source:      what to install
    least, most: from which release on, and before which; any where `source` names a commit
    """

    module: str
    library: str
    source: str
    least: tuple[int, ...] = ()
    most: tuple[float, ...] = (math.inf,)


OTHER_KERNELS = {"linears": "core", "attention": "own", "norms": "own", "experts": "own"}
"""Settings that name the kernels of a library -> their value that needs none."""
KERNELS = {
    "transformer_engine": Kernels(
        "transformer_engine",
        "TransformerEngine",
        "'transformer_engine[pytorch]>=2.11,<3'",
        (2, 11),
        (3,),
    ),
    "grouped_gemm": Kernels(
        "grouped_gemm",
        "grouped_gemm",
        "git+https://github.com/fanshiqing/grouped_gemm@v1.1.4",
    ),
    "flex": Kernels("deep_ep", "DeepEP", "git+https://github.com/deepseek-ai/DeepEP@v1.2.1"),
}
"""Choice -> its kernels."""
