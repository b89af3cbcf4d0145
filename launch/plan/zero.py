"""What DeepSpeed's ZeRO keeps on a rank: exact; and what it sends, at least.

Stages 1 and 2 lay the parameters of each of the optimizer's groups behind each other and cut that
into equal partitions, aligned to two numbers a rank. Stage 3 cuts each parameter by itself, and
keeps small ones whole besides. Experts that ranks have between them are in groups of their own, cut
over the ranks that have the same ones. Masters, moments and averages are in float32 whatever the
model computes in. Stages: Rajbhandari et al., "ZeRO", arXiv 1910.02054, sections 5 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kinodit.launch.plan.communication import Messages
from kinodit.launch.plan.state import State, Weights
from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.optim.build import STEP_BYTES
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.shard import SHARD
from kinodit.trainer.parallel.volume import Formats

MASTER_BYTES = 4
ALIGNED = 2
"""Numbers of each rank that a group of stages 1 and 2 is filled up to a multiple of."""
BUCKET, SMALL, LIVE = 500_000_000, 100_000, 1_000_000_000
"""DeepSpeed's defaults, in numbers: gradients that are reduced at once; parameters of stage 3 that
stay whole; parameters that may be gathered at once."""


@dataclass(frozen=True)
class OnRank:
    """State on a rank's device, what lies on the host instead, and buffers on the device."""

    state: State
    host: int
    buffers: int


@dataclass(frozen=True)
class Cut:
    """Numbers, not bytes.

    whole:  of all parameters, after the split over tp and ep, as the partitions of all ranks
    own:    of one rank's partitions
    others: of `whole`, what other ranks have
    kept:   of parameters that stage 3 keeps whole
    groups: of the optimizer
    shared: of those groups, or of parameters at stage 3, how many other ranks have parts of
    nearby: of hpZ's second partitions
    """

    whole: int
    own: int
    others: int
    kept: int
    groups: int
    shared: int
    nearby: int = 0


@dataclass(frozen=True)
class _Group:
    """Of the optimizer: sizes of its parameters on a rank, and how many ranks partition them."""

    sizes: Sequence[int]
    num_ranks: int


def cut_by(weights: Weights, engine: DeepSpeedConfig, parallel: ParallelConfig) -> Cut:
    """How `engine` cuts the parameters over dp_shard x cp."""
    groups = list(_groups(weights, parallel))
    if engine.stage < 3:
        # Of each group one number for a rank, and the ranks.
        parts = [
            (-(-sum(group.sizes) // (ALIGNED * group.num_ranks)) * ALIGNED, group.num_ranks)
            for group in groups
        ]
    else:
        parts = [
            (-(-size // group.num_ranks), group.num_ranks)
            for group in groups
            for size in group.sizes
        ]
    cut = Cut(
        whole=sum(own * num_ranks for own, num_ranks in parts),
        own=sum(own for own, _ in parts),
        others=sum(own * (num_ranks - 1) for own, num_ranks in parts),
        kept=0,
        groups=len(groups),
        shared=sum(num_ranks > 1 for _, num_ranks in parts),
    )
    if engine.stage < 3:
        return cut
    threshold = setting(engine, "stage3_param_persistence_threshold", SMALL)
    every = [(size, group.num_ranks) for group in groups for size in group.sizes]
    return replace(
        cut,
        # What one rank alone has is its partition, too.
        kept=sum(size for size, num_ranks in every if num_ranks > 1 and size <= threshold),
        nearby=sum(-(-size // engine.hpz) for size, _ in every) if engine.hpz > 1 else 0,
    )


def _groups(weights: Weights, parallel: ParallelConfig) -> Iterator[_Group]:
    num_ranks = parallel.dp_shard * parallel.cp
    shapes = zip(weights.weights, weights.local_shapes(parallel.tp), strict=True)
    sizes = {weight.name: math.prod(shape) for weight, shape in shapes}
    dealt = {weight.name for weight in weights.weights if weight.pool and parallel.ep > 1}
    for group in weights.optimizer_groups():
        rest = [sizes[name] for name in group if name not in dealt]
        experts = [sizes[name] // parallel.ep for name in group if name in dealt]
        if rest:
            yield _Group(rest, num_ranks)
        if experts:
            yield _Group(experts, num_ranks // parallel.ep)


def setting(engine: DeepSpeedConfig, key: str, default: int) -> int:
    """A number of DeepSpeed's `zero_optimization`, by the name that its JSON config has for it."""
    extra: Mapping[str, Any] = engine.extra.get("zero_optimization", {})
    return int(extra.get(key, default))


def zero_plan(
    weights: Weights,
    engine: DeepSpeedConfig,
    parallel: ParallelConfig,
    formats: Formats,
    num_averages: int,
    passes: int = 1,
) -> OnRank:
    """Bytes of a rank. passes: micro-batches, between which stage 1 adds gradients up whole."""
    cut = cut_by(weights, engine, parallel)
    masters, compute = cut.own * MASTER_BYTES, formats.compute
    held = cut.whole if engine.stage < 3 else cut.own + cut.kept + cut.nearby
    model = held * compute
    # An optimizer counts the updates of each tensor that it has.
    optimizer = 2 * masters + cut.groups * STEP_BYTES
    averages = num_averages * (masters + weights.num_buffered * MASTER_BYTES)
    gradients = masters
    host = 0
    if engine.offload_optimizer != "none":
        host += masters + gradients + optimizer + averages
        masters = gradients = optimizer = averages = 0
    if engine.offload_params != "none":
        host += cut.own * compute
        model -= cut.own * compute
    buffers = setting(engine, "reduce_bucket_size", BUCKET) * compute
    if engine.stage == 1 and passes > 1:
        buffers += cut.whole * compute
    if engine.stage == 3:
        live = setting(engine, "stage3_max_live_parameters", LIVE)
        buffers += min(cut.whole, live) * compute
    state = State(model + masters, gradients, optimizer, averages)
    return OnRank(state, host, buffers)


def zero_messages(
    weights: Weights,
    engine: DeepSpeedConfig,
    parallel: ParallelConfig,
    formats: Formats,
    passes: int,
) -> Messages | None:
    """What a rank is sent over dp_shard x cp in a step, at least; None with one rank.

    Stage 1 reduces gradients once a step, to the rank that updates them, and stages 2 and 3 once
    for each micro-batch, having no place for whole ones. Updated parameters are gathered once a
    step; at stage 3 for each forward, and again for its backward if not all may stay. A message for
    each bucket, or for each parameter. (Experts that are dealt out break buckets: a few more.)
    """
    num_ranks = parallel.dp_shard * parallel.cp
    if num_ranks == 1:
        return None
    cut = cut_by(weights, engine, parallel)
    reductions = 1 if engine.stage == 1 else passes
    gathers = 1
    if engine.stage == 3:
        live = setting(engine, "stage3_max_live_parameters", LIVE)
        gathers = passes if cut.whole <= live else 2 * passes
    num_bytes = cut.others * (reductions * formats.reduce + gathers * formats.compute)
    buckets = -(-cut.whole // setting(engine, "reduce_bucket_size", BUCKET))
    count = reductions * buckets + gathers * cut.shared
    return Messages(SHARD, count, num_bytes, parallel.tp * num_ranks)
