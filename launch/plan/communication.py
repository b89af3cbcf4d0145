"""What a rank is sent in a step, by what it is for.

The formulas are those of `trainer/parallel/volume.py`, which the trainer's own messages are held
to; here with the padding that FSDP2 adds where ranks do not divide the rows of a parameter. The few
numbers that steer a run (counts of tokens, norms, flags) are left out. Experts are taken to have
even loads.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from kinodit.trainer.parallel.volume import Formats, Weights, Work, least

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
    return [
        Messages(label, found[label].messages, found[label].num_bytes, spans[axis])
        for label, axis in AXES.items()
        if label in found and found[label].messages
    ]
