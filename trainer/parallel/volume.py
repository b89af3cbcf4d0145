"""The least that has to cross between ranks in a training step, as formulas.

Bytes are those that a rank receives, on average over the ranks of its group; messages are the
collectives that it takes part in and the transfers that it receives. Both are what the layout needs
by itself, whatever carries it out: each number that a rank lacks comes once, and what is needed at
the same time comes together. `trainer/parallel/traffic.py` counts what was really sent.

    all-gather, reduce-scatter of S bytes over n ranks   (n - 1) / n * S
    all-reduce                                           2 * (n - 1) / n * S
    all-to-all of S bytes held by each rank              (n - 1) / n * S
    from each to each of a ring, S bytes held by each    (n - 1) * S

Shape legend: n ranks of an axis, d width of a stream, L tokens of a stream in the pack, H query
heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.parallel.context import ULYSSES
from kinodit.trainer.parallel.expert import COUNTS, EXPERTS
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.ring import RING
from kinodit.trainer.parallel.shard import REPLICATE, SHARD
from kinodit.trainer.parallel.table import assign_splits, table_of
from kinodit.trainer.parallel.tensor import MODULATION, SCORES, STORED, TOKENS, WHOLE


@dataclass(frozen=True)
class Volume:
    """num_bytes: that a rank receives in a step; messages: that it takes part in."""

    num_bytes: float = 0.0
    messages: int = 0

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.num_bytes + other.num_bytes, self.messages + other.messages)

    def __mul__(self, times: int) -> Volume:
        return Volume(self.num_bytes * times, self.messages * times)


@dataclass(frozen=True)
class Formats:
    """Bytes of a number: at rest, in computation, in sums of gradients."""

    params: int
    compute: int
    reduce: int


@dataclass(frozen=True)
class Weights:
    """How many numbers a rank has to do with, after the split over tp and before FSDP2.

    blocks: of each block, in order; rest: of everything else
    stored: numbers of each matrix that is split at rest and whole in use, whole: outside of blocks
    stored_in_blocks: the same, by block
    whole: numbers that every tp rank has whole
    experts: where ranks have experts between them, of each pool in each block what one of them
             has; those numbers are not among `blocks` then
    """

    blocks: tuple[int, ...]
    rest: int
    stored: tuple[int, ...] = ()
    stored_in_blocks: tuple[tuple[int, ...], ...] = ()
    whole: int = 0
    experts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Work:
    """What the ranks that share a pack do in a step: `passes` forwards and backwards.

    tokens: stream -> L, all tokens of a pack; levels: rows of its table of noise levels
    runs:   forwards of each block in a pass: 2 where the backward computes it again, since what
            was received is not kept
    seen:   of the keys that the ranks of a ring have of each other, the part that queries of the
            other rank see (`trainer/parallel/pairs.py`)
    """

    model: MMDiTConfig
    weights: Weights
    tokens: Mapping[str, int]
    levels: int
    runs: Sequence[int]
    passes: int = 1
    seen: float = 1.0


def least(work: Work, parallel: ParallelConfig, formats: Formats) -> dict[str, Volume]:
    """Label of `traffic.py` -> the least that it takes. `parallel.dp_shard` must be given.

    Labels of axes with one rank are left out; control messages have no formula.
    """
    found: dict[str, Volume] = {}
    if parallel.tp > 1:
        found[TOKENS] = exchanged_tokens(work, parallel, formats.compute)
        found[MODULATION] = joined_rows(work, parallel.tp, formats.compute)
        found[STORED] = stored_weights(work, parallel.tp, formats.compute)
        found[WHOLE] = whole_gradients(work.weights, parallel, formats.params)
    if parallel.ulysses > 1:
        found[ULYSSES] = exchanged_heads(work, parallel, formats.compute)
    if parallel.ring > 1:
        wide = max(formats.compute, torch.float32.itemsize)
        found[RING] = passed_keys(work, parallel, formats.compute, wide)
    if parallel.ep > 1:
        found[EXPERTS] = exchanged_rows(work, parallel, formats.compute)
        found[COUNTS] = told_counts(work, parallel.ep)
    are_dropless = all(pool.router.is_dropless for pool in work.model.experts.values())
    if parallel.tp * parallel.cp > 1 and not are_dropless:
        wide = max(formats.compute, torch.float32.itemsize)
        found[SCORES] = compared_scores(work, parallel, wide)
    if parallel.dp_shard * parallel.cp > 1:
        found[SHARD] = sharded_weights(work, parallel, formats)
    if parallel.dp_replicate > 1:
        found[REPLICATE] = summed_replicas(work.weights, parallel, formats.reduce)
    return found


def exchanged_tokens(work: Work, parallel: ParallelConfig, item: int) -> Volume:
    """Around each half-block one all-gather and one reduce-scatter of L x d for all streams.

    The backward is the same the other way round (Korthikanti et al., arXiv 2205.05198, section
    4.2.2). Streams of which nothing is used after the last attention enter only its all-gather.
    """
    model, total = work.model, Volume()
    for index, runs in enumerate(work.runs):
        is_joint = index < model.num_double_blocks
        sizes = {name: work.tokens[name] * model.stream_width(name) for name in model.streams}
        on = sum(s for name, s in sizes.items() if not (is_joint and model.is_last(name, index)))
        seams = 4 if is_joint else 2
        numbers = sum(sizes.values()) + (seams - 1) * on
        total += Volume(numbers, seams) * (runs + 1)
    share = (parallel.tp - 1) / parallel.tp / parallel.cp * item
    return Volume(total.num_bytes * share, total.messages) * work.passes


def joined_rows(work: Work, tp: int, item: int) -> Volume:
    """Modulation rows, split by columns: put together once a block, gradients back."""
    model, total = work.model, Volume()
    full = model.parts_per_branch
    for index, runs in enumerate(work.runs):
        if index < model.num_double_blocks:
            columns = sum(
                (full - 1 if model.is_last(name, index) else 2 * full) * model.stream_width(name)
                for name in model.streams
            )
        else:
            columns = full * model.stream_width(next(iter(model.streams)))
        total += Volume(columns, 1) * (runs + 1)
    if model.modulation_rank:
        columns = 0
        if model.num_double_blocks:
            columns += sum(2 * full * model.stream_width(name) for name in model.streams)
        if model.num_single_blocks:
            columns += full * model.stream_width(next(iter(model.streams)))
        total += Volume(columns, 1) * 2
    num_bytes = total.num_bytes * work.levels * (tp - 1) / tp * item
    return Volume(num_bytes, total.messages) * work.passes


def stored_weights(work: Work, tp: int, item: int) -> Volume:
    """Matrices that are split at rest alone: gathered before use, gradients back."""

    def each(numbers: Iterable[int]) -> Volume:
        sizes = list(numbers)
        return Volume(sum(sizes) * (tp - 1) / tp * item, len(sizes))

    total = each(work.weights.stored) * 2
    for sizes, runs in zip(work.weights.stored_in_blocks, work.runs, strict=True):
        total += each(sizes) * (runs + 1)
    return total * work.passes


def whole_gradients(weights: Weights, parallel: ParallelConfig, item: int) -> Volume:
    """Gradients of what every tp rank has whole, summed once a step, each rank its shard."""
    shard = weights.whole / (parallel.dp_shard * parallel.cp)
    return Volume(2 * (parallel.tp - 1) / parallel.tp * shard * item, 1)


def exchanged_heads(work: Work, parallel: ParallelConfig, item: int) -> Volume:
    """One all-to-all for q, k and v, one for the result, and both again in the backward.

    A rank sends each other one the heads of its own tokens (Jacobs et al., arXiv 2309.14509,
    section 3.2). With fewer than n key/value heads, each rank needs one.
    """
    model, count = work.model, parallel.ulysses
    kv_heads = model.kv_heads // parallel.tp
    kv_heads = kv_heads if kv_heads % count == 0 else count
    held = sum(work.tokens.values()) / parallel.cp
    numbers = held * 2 * (model.num_heads // parallel.tp + kv_heads) * model.dim_of_head
    times = (sum(work.runs) + len(work.runs)) * work.passes
    return Volume((count - 1) / count * numbers * item, 2) * times


def passed_keys(work: Work, parallel: ParallelConfig, item: int, wide: int) -> Volume:
    """Keys and values to each other rank; in the backward again, and their gradients back.

    Only those that it has a query for. `wide`: bytes of a number of such gradients, which are
    summed in at least float32 (Liu et al., arXiv 2310.01889, section 3).
    """
    model, hops = work.model, parallel.ring - 1
    kv_heads = model.kv_heads // parallel.tp
    kv_heads = kv_heads // parallel.ulysses if kv_heads % parallel.ulysses == 0 else 1
    held = sum(work.tokens.values()) / parallel.ring * work.seen
    numbers = held * 2 * kv_heads * model.dim_of_head
    times = sum(work.runs) + len(work.runs)
    keys = Volume(numbers * item, 1) * (hops * times)
    gradients = Volume(numbers * wide, 1) * (hops * len(work.runs))
    return (keys + gradients) * work.passes


def exchanged_rows(work: Work, parallel: ParallelConfig, item: int) -> Volume:
    """Each token's rows to its experts and back, and both again in the backward.

    With tokens chosen evenly, (n - 1) / n of the rows have their expert elsewhere. (Lepikhin et
    al., "GShard", arXiv 2006.16668, section 3.)
    """
    total = Volume()
    for index, runs in enumerate(work.runs):
        for pool, tokens, width in _pools(work, index):
            total += Volume(2 * tokens * pool.top_k * width, 2) * (runs + 1)
    share = (parallel.ep - 1) / parallel.ep / parallel.cp * item
    return Volume(total.num_bytes * share, total.messages) * work.passes


def told_counts(work: Work, ep: int) -> Volume:
    """Before rows travel, how many there are for each expert, as int64."""
    total = Volume()
    for index, runs in enumerate(work.runs):
        for pool, _, _ in _pools(work, index):
            num_bytes = pool.num_experts * torch.int64.itemsize * (ep - 1) / ep
            total += Volume(num_bytes, 1) * runs
    return total * work.passes


def compared_scores(work: Work, parallel: ParallelConfig, wide: int) -> Volume:
    """Scores of all tokens of a pack, where those of a sample compete, and each one's sample.

    `wide`: bytes of a score. No gradient goes back.
    """
    total = Volume()
    for index, runs in enumerate(work.runs):
        for pool, tokens, _ in _pools(work, index):
            if not pool.router.is_dropless:
                total += Volume(tokens * (pool.num_experts + 1), 1) * runs
    count = parallel.tp * parallel.cp
    share = (count - 1) / count * wide
    return Volume(total.num_bytes * share, total.messages) * work.passes


def _pools(work: Work, index: int) -> Iterator[tuple[ExpertsConfig, int, int]]:
    """(pool, tokens of the pack that meet it, width) of block `index`."""
    model, first_single = work.model, work.model.num_double_blocks
    if index >= first_single:
        pool = model.experts_in(SINGLE, index - first_single)
        if pool is not None:
            width = model.stream_width(next(iter(model.streams)))
            yield pool, sum(work.tokens.values()), width
        return
    for name in model.streams:
        pool = model.experts_in(name, index)
        if pool is not None and not model.is_last(name, index):
            yield pool, work.tokens[name], model.stream_width(name)


def sharded_weights(work: Work, parallel: ParallelConfig, formats: Formats) -> Volume:
    """Parameters before each forward and backward, gradients once a step; a message for each unit.

    Units are the blocks, and the rest of the model. Those that the forward ends with are needed at
    once by the backward, and stay: the rest, and the last block (Rajbhandari et al., "ZeRO", arXiv
    1910.02054, section 7.2). Pools of experts that ranks have between them are units as well, over
    the ranks that have the same ones.
    """
    weights, count = work.weights, parallel.dp_shard * parallel.cp
    blocks = [(size,) for size in weights.blocks]
    total = _sharded(
        [*blocks[:-1]], [*blocks[-1:], (weights.rest,)], work.passes, count, parallel, formats
    )
    if parallel.ep > 1:
        pools = weights.experts
        total += _sharded(
            pools[:-1], pools[-1:], work.passes, count // parallel.ep, parallel, formats
        )
    return total


def _sharded(
    freed: Sequence[Sequence[int]],
    kept: Sequence[Sequence[int]],
    passes: int,
    count: int,
    parallel: ParallelConfig,
    formats: Formats,
) -> Volume:
    """Of units over `count` ranks: those that a forward frees, and those that it ends with."""
    if count == 1:
        return Volume()
    every, again = _sum_of([*freed, *kept]), Volume()
    if parallel.reshard_after_forward:
        again = _sum_of(freed)
    gathered = (every + again) * passes
    num_bytes = gathered.num_bytes * formats.compute + every.num_bytes * formats.reduce
    return Volume(num_bytes * (count - 1) / count, gathered.messages + every.messages)


def _sum_of(units: Sequence[Sequence[int]]) -> Volume:
    """Numbers of units, a message each."""
    return Volume(sum(map(sum, units)), sum(map(len, units)))


def summed_replicas(weights: Weights, parallel: ParallelConfig, item: int) -> Volume:
    """Each rank's shard of the gradients, summed over replicas once a step."""
    shard = (sum(weights.blocks) + weights.rest) / (parallel.dp_shard * parallel.cp)
    experts = _sum_of(weights.experts)
    shard += experts.num_bytes / (parallel.dp_shard * parallel.cp // parallel.ep)
    count, messages = parallel.dp_replicate, len(weights.blocks) + 1 + experts.messages
    return Volume(2 * (count - 1) / count * shard * item, messages)


def weights_of(model: MMDiT, blocks: Sequence[nn.Module], tp: int, ep: int = 1) -> Weights:
    """The numbers of a model that has not been laid out yet."""
    pools = [[layer.experts for layer in moe_layers(block).values()] for block in blocks]
    dealt = {id(p) for inside in pools for pool in inside for p in pool.parameters()}
    owner = {id(p): index for index, block in enumerate(blocks) for p in block.parameters()}
    splits = assign_splits(model, table_of(model), tp) if tp > 1 else {}
    inside = [0] * len(blocks)
    stored_inside: list[list[int]] = [[] for _ in blocks]
    stored: list[int] = []
    rest = whole = 0
    local_counts: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        block, count, split = owner.get(id(parameter)), parameter.numel(), splits.get(name)
        if split is not None and split.dim is None:
            whole += count
        local = count if split is None or split.dim is None else count // tp
        local_counts[id(parameter)] = local
        if split is not None and split.dim is not None and not split.part:
            (stored if block is None else stored_inside[block]).append(count)
        if ep > 1 and id(parameter) in dealt:
            continue
        if block is None:
            rest += local
        else:
            inside[block] += local
    experts: tuple[tuple[int, ...], ...] = ()
    if ep > 1:
        experts = tuple(
            tuple(sum(local_counts[id(p)] for p in pool.parameters()) // ep for pool in of_block)
            for of_block in pools
        )
    within = tuple(map(tuple, stored_inside))
    return Weights(tuple(inside), rest, tuple(stored), within, whole, experts)
