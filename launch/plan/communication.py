"""What a rank is sent in a step, by what it is for.

The formulas are those of `trainer/parallel/volume.py`, which the trainer's own messages are held
to; here with the padding that FSDP2 adds where ranks do not divide the rows of a parameter. The few
numbers that steer a run (counts of tokens, norms, flags) are left out. Experts are taken to have
even loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kinodit.launch.plan.activations import block_modes
from kinodit.launch.plan.blocks import Pass
from kinodit.launch.plan.state import Units
from kinodit.trainer.parallel.context import ULYSSES
from kinodit.trainer.parallel.expert import COUNTS, EXPERTS
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.ring import RING
from kinodit.trainer.parallel.shard import REPLICATE, SHARD
from kinodit.trainer.parallel.tensor import MODULATION, SCORES, STORED, TOKENS, WHOLE
from kinodit.trainer.parallel.volume import Formats, Volume, Weights, Work, compared_scores, least

FLOAT32 = 4
"""Bytes of a number that scores are compared in, at least."""
AXES = {
    TOKENS: "tp",
    MODULATION: "tp",
    STORED: "tp",
    WHOLE: "tp",
    ULYSSES: "cp (heads)",
    RING: "cp (ring)",
    SCORES: "tp and cp",
    EXPERTS: "ep",
    COUNTS: "ep",
    SHARD: "dp_shard",
    REPLICATE: "dp_replicate",
}
"""Label of `trainer/parallel/traffic.py` -> what it goes over, innermost first."""


@dataclass(frozen=True)
class Messages:
    """Of one label in a step, on each rank. span: neighbouring ranks that a group lies within."""

    label: str
    count: int
    nbytes: float
    span: int

    @property
    def axis(self) -> str:
        """What it goes over."""
        return AXES[self.label]


def traffic(
    work: Pass,
    units: Units,
    parallel: ParallelConfig,
    remat: RematConfig,
    formats: Formats,
    passes: int,
) -> list[Messages]:
    """Every label of an axis with more than one rank, innermost first; `passes` forwards."""
    # Collectives are never kept: blocks that are computed again talk again.
    modes = block_modes(work.model, remat)
    runs = [1 if mode in ("none", "offload") else 2 for mode in modes]
    num_ranks = parallel.dp_shard * parallel.cp
    weights = Weights(
        units.blocks,
        units.rest,
        units.stored.get(None, ()),
        tuple(units.stored.get(index, ()) for index in range(len(units.blocks))),
        units.replicated * num_ranks,
        units.experts,
    )
    step = Work(work.model, weights, work.crowd.whole, work.sizes.levels, runs, passes)
    spans = {
        "tp": parallel.tp,
        "cp (heads)": parallel.tp * parallel.ulysses,
        "cp (ring)": parallel.tp * parallel.cp,
        "tp and cp": parallel.tp * parallel.cp,
        "ep": parallel.tp * parallel.ep,
        "dp_shard": parallel.tp * num_ranks,
        "dp_replicate": parallel.tp * num_ranks * parallel.dp_replicate,
    }
    found = least(step, parallel, formats)
    if work.crowd.copied:
        found |= _with_the_same_tokens(step, parallel, formats)
    return [
        Messages(label, found[label].messages, found[label].num_bytes, spans[axis])
        for label, axis in AXES.items()
        if label in found and found[label].messages
    ]


def _with_the_same_tokens(
    work: Work, parallel: ParallelConfig, formats: Formats
) -> dict[str, Volume]:
    """What differs where tp ranks have the same tokens.

    After each half-block one all-reduce of L x d for all streams that go on, and as many in the
    backward (Shoeybi et al., arXiv 1909.08053, figure 4). Scores of experts that tokens of a pack
    compete for cross between cp ranks alone.
    """
    model, total = work.model, Volume()
    for index, runs in enumerate(work.runs):
        is_joint = index < model.num_double_blocks
        on = sum(
            work.tokens[name] * model.stream_width(name)
            for name in model.streams
            if not (is_joint and model.is_last(name, index))
        )
        total += Volume(on, 1) * ((2 if is_joint else 1) * (runs + 1))
    share = 2 * (parallel.tp - 1) / parallel.tp / parallel.cp * formats.compute
    tokens = Volume(total.num_bytes * share, total.messages) * work.passes
    wide = max(formats.compute, FLOAT32)
    scores = compared_scores(work, replace(parallel, tp=1), wide)
    return {TOKENS: tokens, SCORES: scores if parallel.cp > 1 else Volume()}
