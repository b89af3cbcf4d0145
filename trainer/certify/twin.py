"""A small model of the same structure: what a certificate is computed on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kinodit.data.synthetic import SECONDS_PER_FRAME, SLOTS_PER_STEP, SyntheticStream
from kinodit.data.tasks import TaskConfig
from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.rope import RopeConfig
from kinodit.trainer.config import RunConfig, differences, flatten
from kinodit.trainer.optim import AdamW8bitConfig, OptimConfig

HEAD_DIM = 16
"""A multiple of 8, as CUDA's flash kernels need, that three axes of positions can share."""
NUM_STEPS = 3
MAX_HEADS = 4
MAX_BLOCKS = 2
MAX_RANK = 4
MAX_EXPERTS = 4


@dataclass(frozen=True)
class Twin:
    """A recipe with a small model. shrunk: (key, the recipe's value, the twin's)."""

    config: RunConfig
    shrunk: tuple[tuple[str, Any, Any], ...]

    @property
    def streams(self) -> dict[str, SyntheticStream]:
        """What its synthetic packs hold."""
        return {
            name: SyntheticStream(stream.in_channels, stream.output)
            for name, stream in self.config.model.streams.items()
        }

    @property
    def num_steps(self) -> int:
        """Steps of a proof: as many as it takes for every task to come once."""
        return max(NUM_STEPS, -(-len(self.config.tasks) // SLOTS_PER_STEP))

    @property
    def conditions(self) -> dict[str, int]:
        """Dims of the condition vectors of its packs."""
        return {name: condition.dim for name, condition in self.config.model.conditions.items()}


def twin(config: RunConfig) -> Twin:
    """The recipe with its model made small, and nothing else of its structure changed.

    Streams and their relative widths, kinds of blocks, norms, modulation, biases, the ratio of
    query to key/value heads, conditions, positions and their axes stay. Fewer and narrower heads,
    fewer blocks, fewer channels: none of them is what a layout gets wrong. Tasks stay, and all of
    them are mixed in its packs. Nor are moments of 8
    bits, which there are none of in float64 and in so small a model: their AdamW has whole ones.
    """
    small = _small_model(config.model)
    optim = _exact_optimizer(config.optim)
    tasks = {name: _small_task(task) for name, task in config.tasks.items()}
    shrunk = differences(flatten_model(config.model), flatten_model(small))
    shrunk += differences({"optim.name": config.optim.name}, {"optim.name": optim.name})
    shrunk += differences(_blocks(config.tasks), _blocks(tasks))
    return Twin(replace(config, model=small, optim=optim, tasks=tasks), tuple(shrunk))


def _small_task(task: TaskConfig) -> TaskConfig:
    """Blocks of one frame, since the twin's samples have few."""
    return replace(task, block_s=SECONDS_PER_FRAME) if task.block_s else task


def _blocks(tasks: Mapping[str, TaskConfig]) -> dict[str, float]:
    return {f"tasks.{name}.block_s": task.block_s for name, task in tasks.items()}


def _exact_optimizer(optim: OptimConfig) -> OptimConfig:
    if not isinstance(optim, AdamW8bitConfig):
        return optim
    shared = {entry.name: getattr(optim, entry.name) for entry in fields(OptimConfig)}
    return OptimConfig(**{**shared, "name": "adamw"})


def flatten_model(model: MMDiTConfig) -> dict[str, Any]:
    """Every key of a model's config with its value."""
    return flatten({"model": asdict(model)})


def _small_model(model: MMDiTConfig) -> MMDiTConfig:
    per_kv = model.num_heads // model.kv_heads
    kv_heads = _divisor(model.kv_heads, max(1, MAX_HEADS // per_kv))
    num_heads = kv_heads * per_kv
    inner = model.num_heads * model.dim_of_head
    width = _scaled(model.width, inner, num_heads * HEAD_DIM)
    streams = {
        name: _small_stream(stream, index, width / model.width)
        for index, (name, stream) in enumerate(model.streams.items())
    }
    conditions = {
        name: ConditionConfig(min(condition.dim, 5 + index), condition.kind)
        for index, (name, condition) in enumerate(model.conditions.items())
    }
    return replace(
        model,
        streams=streams,
        conditions=conditions,
        width=width,
        num_heads=num_heads,
        head_dim=HEAD_DIM,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        num_double_blocks=min(model.num_double_blocks, MAX_BLOCKS),
        num_single_blocks=min(model.num_single_blocks, MAX_BLOCKS),
        modulation_rank=min(model.modulation_rank, MAX_RANK),
        condition_width=(
            None
            if model.condition_width is None
            else _scaled(model.condition_width, inner, num_heads * HEAD_DIM)
        ),
        rope=_small_rope(model.rope),
        experts={name: _small_experts(experts) for name, experts in model.experts.items()},
    )


def _small_experts(experts: ExpertsConfig) -> ExpertsConfig:
    """Four experts, which the largest degree divides; where some blocks have them, the first.

    A capacity becomes the least there is: of so few experts, a larger one might never be reached.
    """
    top_k = min(experts.top_k, MAX_EXPERTS // 2)
    num_experts = experts.num_experts
    if experts.router.is_learned:
        num_experts = min(num_experts, MAX_EXPERTS)
    blocks = (0,) if experts.blocks else ()
    router = replace(experts.router, capacity_factor=min(experts.router.capacity_factor, 1.0))
    return replace(experts, num_experts=num_experts, top_k=top_k, blocks=blocks, router=router)


def _small_stream(stream: StreamConfig, index: int, scale: float) -> StreamConfig:
    return replace(
        stream,
        in_channels=min(stream.in_channels, 5 + index),
        out_channels=None if stream.out_channels is None else min(stream.out_channels, 5 + index),
        width=None if stream.width is None else _multiple_of_four(stream.width * scale),
        refiner_blocks=min(stream.refiner_blocks, 1),
    )


def _small_rope(rope: RopeConfig) -> RopeConfig:
    """Axes that have no share keep none; the others share the small head."""
    if not rope.axes:
        return rope
    used = [axis for axis, dim in enumerate(rope.axes) if dim]
    share = 2 * (HEAD_DIM // (2 * len(used)))
    axes = [share if axis in used else 0 for axis in range(3)]
    axes[used[0]] += HEAD_DIM - sum(axes)
    return replace(rope, axes=tuple(axes))


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(d for d in range(1, limit + 1) if number % d == 0)


def _scaled(value: int, whole: int, small: int) -> int:
    """`value` in the proportion of `small` to `whole`."""
    return _multiple_of_four(value * small / whole)


def _multiple_of_four(value: float) -> int:
    return 4 * max(1, math.ceil(value / 4))
