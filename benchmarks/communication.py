"""What a training step sends between ranks, against the least that its layout needs.

Each layout is built by the trainer's own code, rank after rank, on a pretended process group and
pretended tensors: nothing is computed or sent, and every message is counted where it would be. That
real steps send just that, and nothing uncounted, is tested with real processes
(tests/trainer/test_traffic.py). The formulas are in trainer/parallel/volume.py.

    python benchmarks/communication.py [--json FILE]

Rows AXIS/bytes and AXIS/messages are ratios to the least. "odd" has text of 226 tokens and video of
56,697, which nothing divides; the others 256 and 56,576. Rows AXIS/share/LABEL are parts of all
bytes that the layout sends. "recompute" keeps nothing of a block but its input, and its least has
the forward's messages twice; "accumulate" has 4 micro-batches. The shape is that of the preset 2b.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from goals import Row, show
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kinodit.launch.topology import pretended_group
from kinodit.models.mmdit import MMDiT, MMDiTConfig
from kinodit.models.presets import PRESETS
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout
from kinodit.trainer.engine.base import Predictions
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, model_blocks, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import cut
from kinodit.trainer.parallel.tensor import MODULATION, STORED, WHOLE
from kinodit.trainer.parallel.traffic import CONTROL, Traffic
from kinodit.trainer.parallel.volume import Formats, Volume, Work, least, weights_of
from kinodit.trainer.step import count_step

PRECISION = PrecisionConfig(compute="bfloat16")
FORMATS = Formats(params=4, compute=2, reduce=4)
MAX_SHARE = 0.01
"""Of all bytes, at most this for each purpose that is not the axis's own."""
ODD_DEPTH = 2
"""Blocks where every rank is counted, one after the other; the last one aside, all are alike."""
EVEN, ODD = {"text": 256, "video": 56_576}, {"text": 226, "video": 56_697}


@dataclass(frozen=True)
class Case:
    """One step: a preset's shape on a layout, `passes` micro-batches of a pack each."""

    world_size: int
    parallel: ParallelConfig
    preset: str = "2b"
    tokens: Mapping[str, int] | None = None
    passes: int = 1
    remat: str = "none"

    @property
    def lengths(self) -> Mapping[str, int]:
        """stream -> tokens of a pack."""
        return EVEN if self.tokens is None else self.tokens


CASES: dict[str, Case] = {
    "tp": Case(8, ParallelConfig(dp_shard=1, tp=8)),
    "ulysses": Case(8, ParallelConfig(dp_shard=1, cp=8)),
    "ring": Case(8, ParallelConfig(dp_shard=1, cp=8, ring=8)),
    "hybrid": Case(8, ParallelConfig(dp_shard=1, cp=8, ring=2)),
    "fsdp": Case(8, ParallelConfig(dp_shard=8)),
    "hsdp": Case(8, ParallelConfig(dp_replicate=2, dp_shard=4)),
    "ddp": Case(8, ParallelConfig(dp_replicate=8, dp_shard=1)),
    "all": Case(16, ParallelConfig(dp_replicate=2, dp_shard=1, cp=4, ring=2, tp=2)),
    "fsdp/accumulate": Case(8, ParallelConfig(dp_shard=8), passes=4),
    "hsdp/accumulate": Case(8, ParallelConfig(dp_replicate=2, dp_shard=4), passes=4),
    "tp/recompute": Case(8, ParallelConfig(dp_shard=1, tp=8), remat="full"),
    "tp/odd": Case(8, ParallelConfig(dp_shard=1, tp=8), tokens=ODD),
    "ulysses/odd": Case(8, ParallelConfig(dp_shard=1, cp=8), tokens=ODD),
    "ring/odd": Case(8, ParallelConfig(dp_shard=1, cp=8, ring=8), tokens=ODD),
    "hybrid/odd": Case(8, ParallelConfig(dp_shard=1, cp=8, ring=2), tokens=ODD),
}
AXES = {
    "tp": ("tp",),
    "ulysses": ("ulysses",),
    "ring": ("ring",),
    "hybrid": ("ulysses", "ring"),
    "fsdp": ("fsdp",),
    "hsdp": ("hsdp",),
    "ddp": ("hsdp",),
}
"""Name of a case, up to its first slash -> the labels that it is about; of others, all."""


def pack(model: MMDiTConfig, lengths: Mapping[str, int]) -> TokenBatch:
    """One sample of zeros."""
    modalities = {}
    for name, stream in model.streams.items():
        count = lengths[name]
        zeros = torch.zeros(count, dtype=torch.int64)
        modalities[name] = ModalityTokens(
            latents=torch.zeros(count, stream.in_channels),
            segment=zeros,
            group=zeros,
            position=torch.zeros(count, 3),
            role=torch.full((count,), int(Role.NOISED if stream.output else Role.CLEAN)).to(
                torch.int8
            ),
            level=zeros,
            weight=torch.full((count,), float(stream.output)),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.zeros(1, dtype=torch.int64),
        level_t=torch.zeros(1),
        conditions={name: torch.zeros(1, c.dim) for name, c in model.conditions.items()},
        layout=build_layout(list(modalities.values())),
        samples=(SampleKey(0, 0, "zeros"),),
    )


def mapped(batch: TokenBatch, function: Callable[[Tensor], Tensor]) -> TokenBatch:
    """The batch with `function` applied to its tensors."""
    return replace(
        batch,
        modalities={name: tokens.map(function) for name, tokens in batch.modalities.items()},
        level_segment=function(batch.level_segment),
        level_t=function(batch.level_t),
        conditions={name: function(vector) for name, vector in batch.conditions.items()},
    )


def squares(predictions: Predictions) -> Tensor:
    """A loss."""
    return torch.stack([x.square().mean() for x in predictions.values()]).sum()


def counted(case: Case, config: MMDiTConfig, rank: int) -> Traffic:
    """What one rank of a step sends."""
    with pretended_group(rank, case.world_size):
        mesh = build_mesh(case.parallel, case.world_size, rank, torch.device("cpu"))
        with torch.device("meta"):
            model = MMDiT(config)
        remat = RematConfig(case.remat)  # type: ignore[arg-type]
        parallelize(model, mesh, case.parallel, PRECISION, remat, compile_blocks=False)
        whole = pack(config, case.lengths)
        own = cut(whole, mesh.place).of(whole) if mesh.place.num_shares > 1 else whole
        outputs = [name for name, stream in config.streams.items() if stream.output]
        with Traffic() as traffic:
            count_step([whole] * case.passes, outputs, mesh)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                model.to_empty(device="cpu")
                engine = NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, PRECISION)
                batch = mapped(own, mode.from_tensor)
                for index in range(case.passes):
                    engine.forward_backward(batch, squares, last=index == case.passes - 1)
                engine.clip(1.0)
                engine.step(1e-4)
    return traffic


def formulas(case: Case, config: MMDiTConfig) -> dict[str, Volume]:
    """Label -> the least."""
    with torch.device("meta"):
        model = MMDiT(config)
    blocks = model_blocks(model)
    runs = [2 if case.remat == "full" else 1] * len(blocks)
    weights = weights_of(model, blocks, case.parallel.tp)
    work = Work(config, weights, case.lengths, 1, runs, case.passes)
    return least(work, case.parallel, FORMATS)


def rows_of(name: str, depth: int | None = None) -> list[Row]:
    """The rows of one case, with at most `depth` blocks of each kind. Raises if ranks disagree."""
    case, axis = CASES[name], name.partition("/")[0]
    config, is_odd = PRESETS[case.preset], case.tokens is not None
    if depth is not None:
        config = replace(
            config,
            num_double_blocks=min(depth, config.num_double_blocks),
            num_single_blocks=min(depth, config.num_single_blocks),
        )
    # Where everything divides, all ranks send the same.
    ranks = range(case.world_size) if is_odd else (0, case.world_size - 1)
    found = [counted(case, config, rank) for rank in ranks]
    expected = formulas(case, config)
    for traffic in found:
        assert traffic.labels == {*expected, CONTROL}, sorted(traffic.labels)

    def mean(labels: Iterable[str]) -> Volume:
        total = Volume()
        for label in labels:
            messages, num_bytes = zip(*(traffic.total(label) for traffic in found), strict=True)
            assert len(set(messages)) == 1 and (is_odd or len(set(num_bytes)) == 1), label
            total += Volume(sum(num_bytes) / len(found), messages[0])
        return total

    def compared(row: str, labels: Sequence[str], slack: float = 0.0) -> Iterator[Row]:
        sent, need = mean(labels), sum((expected[label] for label in labels), Volume())
        ratio = round(sent.num_bytes / need.num_bytes, 12)
        size = f"{sent.num_bytes / 2**30:.3f} GiB"
        compare = Row.at_most if slack else Row.exactly
        yield compare(f"{row}/bytes", ratio, 1.0 + slack, size)
        ratio = sent.messages / need.messages
        yield Row.exactly(f"{row}/messages", ratio, 1.0, f"{sent.messages} messages")

    labels = AXES.get(axis, tuple(expected))
    # A rank's part of a gathered buffer is as long as the longest: a token more than the mean.
    slack = (case.parallel.tp - 1) / sum(case.lengths.values()) if is_odd and axis == "tp" else 0
    made = list(compared(name, labels, slack))
    if name in ("tp", "all"):
        everything = mean((*expected, CONTROL)).num_bytes
        for label in (MODULATION, STORED, WHOLE, CONTROL):
            sent = mean([label])
            size = f"{sent.num_bytes / 2**20:.3f} MiB, {sent.messages} messages"
            share = sent.num_bytes / everything
            row = label.replace(" ", "_")
            made.append(Row.at_most(f"{name}/share/{row}", share, MAX_SHARE, size))
    if name == "tp":
        for label in (MODULATION, STORED, WHOLE):
            made += compared(label.replace(" ", "_"), [label])
    return made


def main() -> None:
    """Count, print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = (
        row
        for name in args.cases
        for row in rows_of(name, None if CASES[name].tokens is None else ODD_DEPTH)
    )
    show(rows, "to a rank, a step", args.json)


if __name__ == "__main__":
    main()
