"""Models as runs have them: laid out over ranks before they have any memory."""

from __future__ import annotations

import torch

from kinodit.models.config import MMDiTConfig
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.deferred import initial_values, materialize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig

SEED = 3
CPU = torch.device("cpu")
PARALLELS = [
    ParallelConfig(),
    ParallelConfig(dp_replicate=2),
    ParallelConfig(tp=2),
    ParallelConfig(tp=4),
    ParallelConfig(tp=2, dp_replicate=2),
]
"""Of four ranks."""


def laid_out(rank: int, world_size: int, parallel: ParallelConfig, config: MMDiTConfig) -> MMDiT:
    """This rank's part of a model with the weights of `SEED`. Every rank calls it."""
    mesh = build_mesh(parallel, world_size, rank, CPU)
    with torch.device("meta"):
        model = MMDiT(config)
    parallelize(model, mesh, parallel, PrecisionConfig(), RematConfig(), compile_blocks=False)
    materialize(model, initial_values(SEED), CPU)
    return model
