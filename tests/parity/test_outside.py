"""A stream, a block and a parallel strategy of one's own, added without a change to the package.

Each is trained under layouts that it knows nothing of, and compared with one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinodit.models.block import JointBlock
from kinodit.models.config import MMDiTConfig, StreamConfig
from kinodit.models.context import Context
from kinodit.models.mmdit import MMDiT
from kinodit.models.norm import RMSNorm
from kinodit.models.tokens import AttentionLayout
from kinodit.trainer.certify import trace as trace_module
from kinodit.trainer.certify.layouts import with_degrees
from kinodit.trainer.certify.trace import Trace, trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import compare_traces
from kinodit.trainer.config import RunConfig
from kinodit.trainer.parallel import apply, table
from kinodit.trainer.parallel.collectives import gather_rows
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.sequence import CutLayout
from kinodit.trainer.parallel.table import Row, mmdit_table
from tests.support.quick import quick
from tests.support.ranks import Ranks

ALONE = ParallelConfig(dp_shard=1)
CONFIG = MMDiTConfig(
    streams={
        "text": StreamConfig(7, output=False, position="none"),
        "video": StreamConfig(6),
        "depth": StreamConfig(5, width=24),
    },
    width=48,
    num_heads=4,
    num_double_blocks=2,
)


class MixingBlock(JointBlock):
    """A joint block that first adds a gated feed-forward of its own to each stream."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__(config, index)
        self.mixing = nn.ModuleDict(
            {name: Mixing(config.stream_width(name)) for name in config.streams}
        )

    def forward(self, x: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        seen = context.gather({name: self.mixing[name].norm(x[name]) for name in x})  # type: ignore[operator]
        added = context.scatter({name: self.mixing[name](seen[name]) for name in x})
        return super().forward({name: x[name] + added[name] for name in x}, context)


class Mixing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, 1e-6)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


class MixingMMDiT(MMDiT):
    """The model with such a block in the middle."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.joint_blocks[1] = MixingBlock(config, 1)


def mixing_table(config: MMDiTConfig) -> list[Row]:
    own = "joint_blocks.*.mixing.*"
    rows = [Row(f"{own}.norm", "whole"), Row(f"{own}.up", "column"), Row(f"{own}.down", "row")]
    return [*mmdit_table(config), *rows]


CALLS: list[int] = []
"""Tokens of each call of the strategy below, on this rank."""


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """A strategy for cp: every rank puts all keys and values together for its own queries.

    For packs in which a segment sees all of itself and nothing else.
    """
    assert isinstance(layout, CutLayout) and layout.order is not None
    CALLS.append(len(q))
    if sum(layout.lengths) == 0:
        return q + k.sum() + v.sum()
    own = torch.empty(q.shape[0], 1, dtype=q.dtype)
    pieces = torch.tensor(layout.pieces[dist.get_rank()])
    own[layout.order, 0] = torch.tensor(layout.segments).repeat_interleave(pieces).to(q.dtype)
    counts = [sum(row) for row in layout.pieces]
    world = dist.group.WORLD
    assert world is not None
    segments, keys, values = gather_rows(
        [own, k.flatten(1), v.flatten(1)], [counts] * 3, world, "all"
    )
    heads = (-1, q.shape[-1])
    q, k, v = (x.transpose(0, 1) for x in (q, keys.unflatten(1, heads), values.unflatten(1, heads)))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=own == segments.t())
    return out.transpose(0, 1)


def use_gathering(model: nn.Module, layout: apply.Layout) -> None:
    if layout.mesh.place.cp > 1:
        assert isinstance(model, MMDiT)
        model.attend = attend_to_all


def extended_trace(
    rank: int, world_size: int, small: Twin, parallel: ParallelConfig, what: str
) -> Trace:
    with ExitStack() as stack:
        if what == "block":
            stack.enter_context(patch.object(trace_module, "MMDiT", MixingMMDiT))
            stack.enter_context(patch.dict(table.TABLES, {MixingMMDiT: mixing_table}))
        if what == "strategy":
            steps = list(apply.STEPS)
            steps.insert(steps.index(apply.share_tokens) + 1, use_gathering)
            stack.enter_context(patch.object(apply, "STEPS", tuple(steps)))
        CALLS.clear()
        made = trace(rank, world_size, small, parallel)
        assert bool(CALLS) == (what == "strategy")
        return made


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("what", "axis"),
    # With the block, the stream is there too.
    quick(itertools.product(["stream", "block"], ["dp_shard", "cp", "tp"]), ("block", "tp")),
)
def test_a_stream_and_a_block(what: str, axis: str, two: Ranks) -> None:
    small = twin(replace(RunConfig(), model=CONFIG))
    layout = with_degrees(ALONE, {axis: 2})
    traces = two.run(extended_trace, small, layout, what)
    verdict = compare_traces(extended_trace(0, 1, small, ALONE, what), traces)
    assert verdict.ok, verdict.faults
    names = traces[0].gradients
    assert "embeds.depth.linear.weight" in names
    assert ("joint_blocks.1.mixing.depth.up.weight" in names) == (what == "block")


@pytest.mark.gloo
def test_a_strategy(two: Ranks) -> None:
    small = twin(replace(RunConfig(), model=CONFIG))
    layout = replace(ALONE, cp=2, ring=2)
    traces = two.run(extended_trace, small, layout, "strategy")
    verdict = compare_traces(extended_trace(0, 1, small, ALONE, ""), traces)
    assert verdict.ok, verdict.faults
