"""Bytes of each choice of optimizer: those of real tensors on ranks, to the byte."""

from __future__ import annotations

import pytest
import torch

from kinodit.launch.plan.measure import storage_bytes
from kinodit.launch.plan.state import Weights
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.optim import AdamW8bitConfig, MuonConfig, OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.deferred import initial_values, materialize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

MODEL = tiny_model_config(width=128, num_heads=4)
CHOICES = (OptimConfig(), MuonConfig(), AdamW8bitConfig())


def held(rank: int, world_size: int, parallel: ParallelConfig) -> list[int]:
    """Bytes that each choice holds on this rank."""
    sizes = []
    for config in CHOICES:
        mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
        with torch.device("meta"):
            model = MMDiT(MODEL)
        parallelize(model, mesh, parallel, PrecisionConfig(), RematConfig(), compile_blocks=False)
        materialize(model, initial_values(0), mesh.device)
        optimizer = build_optimizer(config, model)
        optimizer.state()
        sizes.append(storage_bytes(optimizer.tensors()))
    return sizes


@pytest.mark.slow
@pytest.mark.gloo
def test_ranks_hold_what_was_planned() -> None:
    parallel = ParallelConfig(dp_shard=2, tp=2)
    group = Ranks(4)
    try:
        found = group.run(held, parallel)
    finally:
        group.close()
    for rank, sizes in enumerate(found):
        planned = [
            Weights(MODEL, config).state(parallel, 4, 0, rank // 2).optimizer for config in CHOICES
        ]
        assert sizes == planned
    adamw, muon, eight_bit = found[0]
    assert muon < 0.75 * adamw and eight_bit < 0.95 * adamw
