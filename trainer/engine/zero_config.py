"""DeepSpeed's JSON config, derived from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.parallel.apply import PrecisionConfig

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FOREIGN = {
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "zero_force_ds_cpu_optimizer": "optim",
    "activation_checkpointing": "remat",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "data_parallel_size": "parallel.dp_shard",
    "expert_parallel": "parallel.ep",
    "pipeline": "parallel",
    "hybrid_engine": "engine",
    "compile": "engine.compile",
    "train_batch_size": "data",
    "data_efficiency": "data",
}
"""Keys of DeepSpeed's config that a recipe decides elsewhere: key -> section of the recipe."""
OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params"}
"""Keys below zero_optimization -> what decides in a recipe whether there is such a thing."""
OTHER_RULES = ("zenflow", "mics_shard_size", "mics_hierarchical_params_gather")
"""Keys below zero_optimization that would update, or partition, by another rule."""
PASSED = (
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
)
"""Keys that watch and change nothing. DeepSpeed says nothing of keys that it does not know."""


def zero_config(engine: DeepSpeedConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """What DeepSpeed is told; `engine.extra` is merged into it.

    Gradients are sums, so that nothing is divided: by `gradient_allreduce_op` where a stage has it.
    Clipping is ours. A micro-batch is one of DeepSpeed's; the engine says which is the last.
    """
    derived = _derived(engine, precision)
    return _merged(derived, engine.extra)


def conflict(engine: DeepSpeedConfig, precision: PrecisionConfig) -> str:
    """Why `engine.extra` contradicts the recipe, and what to change; "" if it does not."""
    derived = _derived(engine, precision)
    for key, value in _leaves(engine.extra):
        first = key.split(".")[0]
        if first in FOREIGN:
            return f"engine.extra.{key}: the recipe's section {FOREIGN[first]} decides that"
        known: Any = derived
        for part in key.split("."):
            known = known.get(part, None) if isinstance(known, dict) else None
        if known is None and (reason := _unwanted(engine, key.split("."))):
            return f"engine.extra.{key}: {reason}"
        if known is not None and known != value:
            return (
                f"engine.extra.{key}={value} contradicts {known}, which follows from the recipe: "
                "remove it"
            )
    return ""


def _unwanted(engine: DeepSpeedConfig, parts: list[str]) -> str:
    """Why DeepSpeed is not told a key that the recipe says nothing of; "" if it is."""
    first, second = parts[0], parts[1] if len(parts) > 1 else ""
    if first == "zero_optimization":
        if second in OFFLOADS and getattr(engine, OFFLOADS[second]) == "none":
            return f"nothing is offloaded; set engine.{OFFLOADS[second]}"
        if second in OTHER_RULES:
            return "the recipe's stage and sections decide what is partitioned, and how it learns"
        return ""
    if first in PASSED:
        return ""
    return (
        "there is no such key that a recipe may pass on: there are zero_optimization's and "
        + ", ".join(PASSED)
    )


def _derived(engine: DeepSpeedConfig, precision: PrecisionConfig) -> dict[str, Any]:
    offloads = engine.offload_optimizer != "none"
    zero: dict[str, Any] = {
        "stage": engine.stage,
        # It would replace torch's linear in the whole process.
        "memory_efficient_linear": False,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "reduce_scatter": precision.reduce_dtype in NAMES,
    }
    if engine.stage < 3 and not offloads:
        zero["compute_grad_norm"] = False
    if engine.stage == 3:
        zero["zero_hpz_partition_size"] = engine.hpz
    for key, place in (
        ("offload_optimizer", engine.offload_optimizer),
        ("offload_param", engine.offload_params),
    ):
        if place == "cpu":
            zero[key] = {"device": "cpu"}
        elif place == "nvme":
            # In files that are mapped into the host's memory, and pages of files are not pinned.
            zero[key] = {"device": "cpu", "pin_memory": False}
    reduced = NAMES.get(precision.reduce_dtype, "fp32")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean" if engine.stage == 3 else "sum",
        "communication_data_type": reduced,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision.compute == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _merged(derived: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        known = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(known, Mapping)
        merged[key] = _merged(known, value) if nested else value  # type: ignore[arg-type]
    return merged


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of what is not a mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
