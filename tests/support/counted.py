"""One training step on a rank, with everything that crosses between ranks counted twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT, MMDiTConfig
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.traffic import Traffic
from kinodit.trainer.step import Step
from tests.support.wire import Wire


@dataclass(frozen=True)
class Counted:
    """By (label, kind), as the trainer reports it; by kind, as torch sends it."""

    messages: Counter[tuple[str, str]]
    num_bytes: Counter[tuple[str, str]]
    wire_messages: Counter[str]
    wire_bytes: Counter[str]
    unknown: list[str]

    def by_kind(self) -> tuple[Counter[str], Counter[str]]:
        """(messages, bytes) by kind, as reported."""
        found: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        for counter, reported in zip(found, (self.messages, self.num_bytes), strict=True):
            for (_, kind), count in reported.items():
                counter[kind] += count
        return found

    def label(self, label: str, kind: str = "") -> tuple[int, int]:
        """(messages, bytes) of a label, of one kind or of all."""
        keys = [key for key in self.messages if key[0] == label and kind in ("", key[1])]
        return sum(self.messages[key] for key in keys), sum(self.num_bytes[key] for key in keys)


def counted_step(
    rank: int,
    world_size: int,
    config: MMDiTConfig,
    parallel: ParallelConfig,
    batches: Sequence[TokenBatch],
    remat: str = "none",
    precision: PrecisionConfig | None = None,
    stray: bool = False,
) -> Counted:
    """The second step of a run on `batches`. stray: someone else sends a message meanwhile."""
    precision = precision or PrecisionConfig()
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    model = MMDiT(config)
    initialize(model, seed=1)
    parallelize(
        model,
        mesh,
        parallel,
        precision,
        RematConfig(remat),  # type: ignore[arg-type]
        compile_blocks=False,
    )
    engine = NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, precision)
    objective = build_objective(RectifiedFlowConfig(prediction="velocity"))
    outputs = [name for name, stream in config.streams.items() if stream.output]
    step = Step(engine, objective, [], mesh, outputs, {}, seed=3, max_grad_norm=1.0)
    step(0, batches, 1e-3)
    with Traffic() as traffic, Wire() as wire:
        step(1, batches, 1e-3)
        if stray:
            dist.all_reduce(torch.ones(3))
    return Counted(traffic.messages, traffic.num_bytes, wire.messages, wire.num_bytes, wire.unknown)
