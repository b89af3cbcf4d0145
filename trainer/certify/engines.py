"""Engines that can be certified, by the name that rows of a certificate give them."""

from __future__ import annotations

from collections.abc import Mapping

from kinodit.models.errors import ConfigError
from kinodit.trainer.certify.layouts import num_ranks
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.config import (
    DeepSpeedConfig,
    EngineConfig,
    MegatronConfig,
    NativeConfig,
    megatron_part,
)
from kinodit.trainer.engine.refusals import Wish, is_missing, refusal
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import ParallelConfig

ENGINES: Mapping[str, EngineConfig] = {
    "native": NativeConfig(),
    **{f"zero{stage}": DeepSpeedConfig(stage=stage) for stage in (1, 2, 3)},
    **{f"zero{stage}-megatron": DeepSpeedConfig(stage=stage, megatron=True) for stage in (1, 2, 3)},
    "megatron": MegatronConfig(),
    "megatron-no-sp": MegatronConfig(sequence_parallel=False),
    # In buckets small enough that the twin has several.
    "megatron-distributed": MegatronConfig(
        data_parallel="distributed_optimizer", bucket_numel=4096
    ),
    "megatron-distributed-no-sp": MegatronConfig(
        sequence_parallel=False, data_parallel="distributed_optimizer", bucket_numel=4096
    ),
    # They have the layouts alone that deal experts out.
    "megatron-alltoall": MegatronConfig(dispatcher="alltoall"),
    "megatron-alltoall-no-sp": MegatronConfig(sequence_parallel=False, dispatcher="alltoall"),
}


def certified_as(engine: EngineConfig) -> str:
    """The key of ENGINES that stands for a recipe's engine."""
    if isinstance(engine, MegatronConfig):
        for kernels in (
            engine.linears,
            engine.attention,
            engine.norms,
            engine.experts,
            engine.dispatcher,
        ):
            if kernels not in ("core", "own", "alltoall"):
                # No row has it: nothing but CUDA runs it.
                return f"{engine.name}-{kernels}"
    if isinstance(engine, DeepSpeedConfig):
        return f"zero{engine.stage}-megatron" if engine.megatron else f"zero{engine.stage}"
    if isinstance(engine, MegatronConfig):
        is_distributed = engine.data_parallel == "distributed_optimizer"
        sharing = "-distributed" if is_distributed else ""
        sharing += "" if engine.dispatcher == "own" else f"-{engine.dispatcher}"
        return engine.name + sharing + ("" if engine.sequence_parallel else "-no-sp")
    return engine.name


def libraries_of(name: str) -> tuple[str, ...]:
    """Libraries that the engine of a row runs on; none for one that no row can have."""
    engine = ENGINES.get(name, NativeConfig())
    zero = ("deepspeed",) if isinstance(engine, DeepSpeedConfig) else ()
    return zero + (("megatron",) if megatron_part(engine) is not None else ())


def chosen_engines(text: str, own: EngineConfig) -> list[str]:
    """Keys of ENGINES from "own", "all" (that are installed) or a list such as "native,zero3".

    Raises:
        ConfigError: there is no such engine.
    """
    if text == "own":
        name = certified_as(own)
        if name not in ENGINES:
            raise ConfigError(
                f"--engines own: nothing but CUDA runs {name}, so that it has no rows; name "
                f"others, of {', '.join(ENGINES)}"
            )
        return [name]
    if text == "all":
        return [name for name, engine in ENGINES.items() if not is_missing(engine.name)]
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise ConfigError(f"--engines {text!r}: there is {', '.join(ENGINES)}, or all, or own")
    return names


def can_have(engine: EngineConfig, layout: ParallelConfig, config: RunConfig) -> bool:
    """Whether an engine has this layout at all, whose dp_shard is given."""
    size = num_ranks(layout)
    wish = Wish(engine, config.optim, layout, PrecisionConfig(), config.remat, size)
    return refusal(wish) == ""
