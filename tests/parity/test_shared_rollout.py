"""Blocks drawn by several ranks are those of one process; keys are remembered where they can be."""

from __future__ import annotations

import itertools

import pytest
import torch

from kinodit.models.diffusion.rollout import Blocks, roll_out
from kinodit.models.parts import can_remember
from kinodit.trainer.certify.trace import Array
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from tests.parity.test_rollout import OBJECTIVE, TIMES, alone, batch_of, drawn, noise_of
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.tasks import TASKS, av_model

LAYOUTS = {
    "dp_shard=2": (ParallelConfig(dp_shard=2), True),
    "cp=2,ring=2": (ParallelConfig(cp=2, ring=2), False),
    "cp=2": (ParallelConfig(cp=2), False),
    "tp=2": (ParallelConfig(tp=2), False),
}
"""Layout, and whether keys are remembered there."""
FLOAT64 = PrecisionConfig("float64", "float64", "float64")


def blocks_by(
    rank: int, world_size: int, parallel: ParallelConfig, name: str
) -> tuple[dict[str, Array], bool]:
    """What is drawn, and whether keys were remembered."""
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    model = av_model()
    parallelize(model, mesh, parallel, FLOAT64, RematConfig(), compile_blocks=False)
    engine = NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, FLOAT64)
    batch = batch_of(TASKS[name])
    remembers = can_remember(model)
    with engine.inference() as forward:
        blocks = Blocks(forward, OBJECTIVE, batch, model if remembers else None)
        latents = roll_out([blocks], alone, noise_of(batch), TIMES, "euler")
    found = drawn(batch, dict(latents))
    return {stream: x.numpy() for stream, x in found.items()}, remembers


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("name", "layout"),
    quick(
        itertools.product(["blocks", "blocks, the last seen"], LAYOUTS),
        *(("blocks", layout) for layout in ("cp=2", "tp=2")),
        *(("blocks, the last seen", layout) for layout in ("dp_shard=2", "cp=2,ring=2")),
    ),
)
def test_ranks_draw_the_blocks_of_one_process(
    name: str, layout: str, groups: dict[int, Ranks]
) -> None:
    parallel, remembers = LAYOUTS[layout]
    expected, _ = blocks_by(0, 1, ParallelConfig(dp_shard=1), name)
    for found, remembered in groups[2].run(blocks_by, parallel, name):
        assert remembered == remembers
        for stream, latents in expected.items():
            assert abs(found[stream] - latents).max() < 1e-11 * abs(latents).max()
