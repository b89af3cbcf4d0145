"""A layout's memory by part, and the time of its step, in the terms of a data sheet.

Estimates: nothing here was measured on a GPU. State is exact, activations follow the model op by
op, communication and FLOPs are counted; what a count costs in seconds is assumed
(`launch/plan/hardware.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kinodit.launch.plan.activations import Activations, activations, block_modes
from kinodit.launch.plan.blocks import Pass
from kinodit.launch.plan.buckets import Buckets, buckets_messages, buckets_of, buckets_plan
from kinodit.launch.plan.communication import Messages, traffic
from kinodit.launch.plan.hardware import LATENCY_S, MADE_TO_MOVED, Cluster
from kinodit.launch.plan.ops import Sizes
from kinodit.launch.plan.seams import Crowd
from kinodit.launch.plan.state import Units, Weights
from kinodit.launch.plan.workload import Workload
from kinodit.launch.plan.zero import OnRank, zero_messages, zero_plan
from kinodit.models.errors import ConfigError
from kinodit.trainer.engine.config import (
    DeepSpeedConfig,
    EngineConfig,
    MegatronConfig,
    NativeConfig,
    megatron_part,
)
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.parallel.float8 import MATRICES
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.shard import SHARD
from kinodit.trainer.parallel.volume import Formats

PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "averages",
    "activations",
    "encoders",
    "buffers",
)
"""Of memory, in the order in which they are shown."""

BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5
"""FLOPs of a backward over those of its forward; flash attention computes its scores again."""

BATCH_BYTES_PER_TOKEN = 48
"""Positions, levels, segments and weights of a token, beside its latents."""

FUSED_PASSES = 10
"""Reads and writes of each parameter's numbers: its norm, clipping, and AdamW's seven."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank by part, the sum of them, and what lies on the host."""

    parts: Mapping[str, int]
    host: int

    @property
    def total(self) -> int:
        """The sum. An upper bound: shards of gradients come as activations go."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Time:
    """Seconds of a step by what they are spent on; communication that is hidden is left out.

    model_flops, hardware_flops: of a step, all ranks; with what is computed again, and attention's
    backward as it is
    """

    parts: Mapping[str, float]
    model_flops: float
    hardware_flops: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a layout takes. passes: forwards of a rank in a step; mfu: model FLOPs over the peak."""

    parallel: ParallelConfig
    remat: RematConfig
    passes: int
    memory: Memory
    time: Time
    traffic: tuple[Messages, ...]
    mfu: float


@dataclass(frozen=True)
class Settings:
    """What does not depend on the layout. wish: of the recipe's engine, if it is not native."""

    workload: Workload
    weights: Weights
    formats: Formats
    cluster: Cluster
    num_averages: int
    micro_batches: int
    wish: Wish | None = None

    @property
    def zero(self) -> DeepSpeedConfig | None:
        """DeepSpeed's settings, if it is the engine."""
        return self.engine if isinstance(self.engine, DeepSpeedConfig) else None

    @property
    def distributed(self) -> MegatronConfig | None:
        """megatron-core's settings, if its distributed optimizer is used; one process has none."""
        engine = self.engine
        if not isinstance(engine, MegatronConfig) or self.cluster.num_gpus == 1:
            return None
        return engine if engine.data_parallel == "distributed_optimizer" else None

    @property
    def engine(self) -> EngineConfig:
        """The recipe's."""
        return NativeConfig() if self.wish is None else self.wish.engine


class Estimator:
    """Estimates of many layouts; what several have in common is computed once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._activations: dict[tuple[object, ...], Activations] = {}
        self._of_pass: dict[int, Workload] = {}
        self._cut: dict[tuple[int, int], Buckets] = {}

    def passes(self, parallel: ParallelConfig) -> tuple[int, int]:
        """(forwards of a rank in a step, packs in each).

        Raises:
            ConfigError: packs do not divide into micro-batches.
        """
        dp = parallel.dp_replicate * parallel.dp_shard
        packs = -(-self.settings.workload.packs // dp)
        count = self.settings.micro_batches or packs
        if packs % count:
            raise ConfigError(
                f"engine.micro_batches={count} does not divide the {packs} packs of a rank"
            )
        return count, packs // count

    def work(self, parallel: ParallelConfig) -> Pass:
        """What a rank computes in one forward."""
        _, merged = self.passes(parallel)
        workload = self._workload(merged)
        levels = workload.segments * workload.levels
        formats = self.settings.formats
        # One process computes in other formats by autocast, which widens what norms and sums
        # take: as if all were wide is the most that it can be.
        item = formats.compute if self.settings.cluster.num_gpus > 1 else formats.params
        sizes = Sizes(item, levels, cuda=True)
        around = crowd(workload, parallel, copied=copies_tokens(self.settings.engine))
        return Pass(workload.model, around, sizes, workload.segments)

    def _workload(self, merged: int) -> Workload:
        """That of one forward over `merged` packs."""
        if merged not in self._of_pass:
            self._of_pass[merged] = self.settings.workload.of_pass(merged)
        return self._of_pass[merged]

    def memory(self, parallel: ParallelConfig, remat: RematConfig) -> Memory:
        """Bytes by part."""
        settings = self.settings
        formats = settings.formats
        state = settings.weights.state(parallel, formats.params, settings.num_averages)
        units = self._units(parallel)
        passes, _ = self.passes(parallel)
        taken = self.activations(parallel, remat)
        cut = self._partitioned(parallel)
        if cut is not None:
            state = cut.state
        at_rest = {
            "parameters": state.parameters,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "averages": state.averages,
        }
        host = taken.host + (0 if cut is None else cut.host)
        if parallel.cpu_offload:
            host += state.total
            at_rest = dict.fromkeys(at_rest, 0)
        if passes > 1 and settings.cluster.num_gpus > 1 and cut is None:
            # Until the last micro-batch gradients are added up whole, before they are reduced.
            at_rest["gradients"] += units.whole * formats.reduce
        buffers = gathered_bytes(units, parallel, formats) if cut is None else cut.buffers
        buffers += copied_gradients(settings.weights, parallel.tp, formats.compute, settings.engine)
        parts = {
            **at_rest,
            "activations": taken.peak,
            "encoders": settings.workload.frozen.on_rank(
                settings.cluster.num_gpus, settings.cluster.per_node, taken.peak
            ),
            "buffers": buffers + self._batch_bytes(parallel),
        }
        return Memory({name: parts[name] for name in PARTS}, host)

    def _partitioned(self, parallel: ParallelConfig) -> OnRank | None:
        """What an engine keeps that partitions by itself; None: FSDP2 does."""
        settings = self.settings
        given = (settings.formats, settings.num_averages)
        if settings.zero is not None:
            passes, _ = self.passes(parallel)
            return zero_plan(settings.weights, settings.zero, parallel, *given, passes)
        if settings.distributed is not None:
            return buckets_plan(self._buckets(parallel), settings.weights, *given)
        return None

    def _shared_out(self, parallel: ParallelConfig) -> list[Messages]:
        """What such an engine sends."""
        settings, formats = self.settings, self.settings.formats
        if settings.zero is not None:
            passes, _ = self.passes(parallel)
            made = zero_messages(settings.weights, settings.zero, parallel, formats, passes)
        else:
            made = buckets_messages(self._buckets(parallel), parallel, formats)
        return [] if made is None else [made]

    def _buckets(self, parallel: ParallelConfig) -> Buckets:
        engine, key = self.settings.distributed, (parallel.tp, parallel.dp_shard * parallel.cp)
        assert engine is not None
        if key not in self._cut:
            self._cut[key] = buckets_of(self.settings.weights, engine, parallel)
        return self._cut[key]

    def _units(self, parallel: ParallelConfig) -> Units:
        num_ranks = parallel.dp_shard * parallel.cp
        return self.settings.weights.units(parallel.tp, num_ranks, parallel.ep)

    def activations(self, parallel: ParallelConfig, remat: RematConfig) -> Activations:
        """Of one forward and backward."""
        _, merged = self.passes(parallel)
        key = (parallel.cp, parallel.ring, parallel.tp, parallel.ep > 1, merged, remat)
        if key not in self._activations:
            self._activations[key] = activations(self.work(parallel), remat)
        return self._activations[key]

    def _batch_bytes(self, parallel: ParallelConfig) -> int:
        """Latents, noise and noised latents in float32, with where they are."""
        _, merged = self.passes(parallel)
        workload = self._workload(merged)
        streams = workload.model.streams
        return sum(
            count * (3 * 4 * streams[name].in_channels + BATCH_BYTES_PER_TOKEN)
            for name, count in workload.pack_tokens.items()
        )

    def estimate(self, parallel: ParallelConfig, remat: RematConfig) -> Estimate:
        """Everything of one layout."""
        settings = self.settings
        passes, _ = self.passes(parallel)
        units = self._units(parallel)
        sent = traffic(self.work(parallel), units, parallel, remat, settings.formats, passes)
        if settings.zero is not None or settings.distributed is not None:
            sent = [one for one in sent if one.label != SHARD] + self._shared_out(parallel)
        time = self._time(parallel, remat, units, sent)
        peak = settings.cluster.peak(settings.formats.compute) * settings.cluster.num_gpus
        return Estimate(
            parallel=parallel,
            remat=remat,
            passes=passes,
            memory=self.memory(parallel, remat),
            time=time,
            traffic=tuple(sent),
            mfu=time.model_flops / (time.step_s * peak),
        )

    def _time(
        self, parallel: ParallelConfig, remat: RematConfig, units: Units, sent: list[Messages]
    ) -> Time:
        settings, cluster = self.settings, self.settings.cluster
        gpu, shares = cluster.gpu, cluster.shares
        passes, merged = self.passes(parallel)
        workload = self._workload(merged)
        shared_by = parallel.cp * parallel.tp
        attention = workload.attention_flops
        products = workload.flops - attention
        again = _again(workload, remat)
        done_products = products * (1 + BACKWARD + again) / shared_by
        done_attention = attention * (1 + ATTENTION_BACKWARD + again) / shared_by
        peak = cluster.peak(settings.formats.compute)
        taken = self.activations(parallel, remat)
        compute = {
            "products": passes * done_products / (peak * shares.products),
            "attention": passes * done_attention / (peak * shares.attention),
            "pointwise": passes * MADE_TO_MOVED * taken.made / (gpu.memory_s * shares.memory),
        }
        computing = sum(compute.values())
        seconds: dict[str, float] = {}
        for one in sent:
            taken_s = one.nbytes / cluster.bandwidth(one.span) + one.count * LATENCY_S
            seconds[one.axis] = seconds.get(one.axis, 0.0) + taken_s
        hideable = seconds.get("dp_shard", 0.0) + seconds.get("dp_replicate", 0.0)
        exposed = {
            "tp": seconds.get("tp", 0.0),
            "cp (heads)": seconds.get("cp (heads)", 0.0),
            "tp and cp": seconds.get("tp and cp", 0.0),
            "cp (ring)": max(0.0, seconds.get("cp (ring)", 0.0) - compute["attention"]),
            "ep": seconds.get("ep", 0.0),
            "dp": max(0.0, hideable - computing),
        }
        shard = units.shard(parallel.dp_shard * parallel.cp, parallel.ep)
        own = shard * settings.formats.params
        touched = own * (FUSED_PASSES + 3 * settings.num_averages)
        zero = settings.zero
        is_offloaded = parallel.cpu_offload or (zero and zero.offload_optimizer != "none")
        host_bytes = 2 * passes * taken.host + (4 * own if is_offloaded else 0)
        parts = {
            **compute,
            **exposed,
            "update": touched / (gpu.memory_s * shares.memory),
            "host": host_bytes / (gpu.host_s * shares.links),
        }
        return Time(
            {name: value for name, value in parts.items() if value},
            model_flops=3.0 * settings.workload.flops * settings.workload.packs,
            hardware_flops=passes * (done_products + done_attention) * cluster.num_gpus,
        )


def _again(workload: Workload, remat: RematConfig) -> float:
    """Share of a forward's matrix products and attention that the backward computes again."""
    modes = block_modes(workload.model, remat)
    return sum(mode == "full" for mode in modes) / len(modes)


def copies_tokens(engine: EngineConfig) -> bool:
    """Whether tp ranks have the same tokens."""
    return isinstance(engine, MegatronConfig) and not engine.sequence_parallel


def copied_gradients(weights: Weights, tp: int, item: int, engine: EngineConfig) -> int:
    """Bytes of gradients that are there twice for a moment, of megatron-core's linears.

    Autograd copies what a function in Python returns, where it takes the result of its own as it
    is. Of two of the largest matrices of blocks, as measured.
    """
    taken = megatron_part(engine)
    if taken is None or taken.linears != "core":
        return 0
    shapes = zip(weights.weights, weights.local_shapes(tp), strict=True)
    return (
        2
        * item
        * max(
            math.prod(shape)
            for weight, shape in shapes
            if MATRICES.match(weight.name.removesuffix(".weight"))
        )
    )


def crowd(workload: Workload, parallel: ParallelConfig, *, copied: bool = False) -> Crowd:
    """The tokens of a pack on the first of the ranks that share it, which has the most.

    copied: whether tp ranks have the same ones
    """
    among = 1 if copied else parallel.tp
    num_shares = parallel.cp * among
    own, seen, held, start = {}, {}, 0, 0
    for name, size in workload.pack_tokens.items():
        dealt = [
            len(range((share - start) % num_shares, size, num_shares))
            for share in range(parallel.ulysses * among)
        ]
        own[name], seen[name] = dealt[0], sum(dealt[:among])
        held += sum(dealt)
        start += size
    return Crowd(
        whole=workload.pack_tokens,
        own=own,
        seen=seen,
        held=held,
        ulysses=parallel.ulysses,
        ring=parallel.ring,
        tp=parallel.tp,
        permuted=parallel.cp * parallel.tp > 1 or workload.segments > 1,
        segments=workload.segments,
        deals_experts=parallel.ep > 1,
        copied=copied and parallel.tp > 1,
    )


def gathered_bytes(units: Units, parallel: ParallelConfig, formats: Formats) -> int:
    """Parameters that FSDP2 has gathered, on their way or in use, and gradients not yet reduced.

    What is not in a block stays gathered from forward to backward. Of blocks, the one that computes
    and those fetched ahead of it; the buffer that one of them arrived in; gradients of one, and the
    buffer from which those of the one before are reduced.
    """
    largest = units.largest
    num_ranks = parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp
    if num_ranks == 1:
        # One process keeps no shards; other formats of computation are copies of the weights.
        return units.total * formats.compute if formats.compute != formats.params else 0
    if parallel.reshard_after_forward:
        blocks = min(1 + parallel.prefetch, len(units.blocks)) * largest
    else:
        blocks = units.total - units.rest
    gathered = (units.rest + blocks + largest) * formats.compute
    return gathered + largest * (formats.compute + formats.reduce)
