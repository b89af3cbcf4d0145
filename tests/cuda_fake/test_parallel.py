"""Blocks of full width, split and shared by 8 ranks, on pretended CUDA tensors and a fake group."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from kinodit.launch.accept.pretended import forward
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.sequence import Place, cut
from tests.cuda_fake.test_model import one_of_each_block, two_clips
from tests.support.quick import quick

RANK = 3
LAYOUTS = {
    "tp8": ParallelConfig(dp_shard=1, tp=8),
    "ulysses8": ParallelConfig(dp_shard=1, cp=8),
    "ring8": ParallelConfig(dp_shard=1, cp=8, ring=8),
    "tp2 x ulysses2 x ring2": ParallelConfig(dp_shard=1, tp=2, cp=4, ring=2),
}
PLACES = {
    "tp8": Place(0, 1, 1, RANK, 8),
    "ulysses8": Place(RANK, 8, 1),
    "ring8": Place(RANK, 1, 8),
    "tp2 x ulysses2 x ring2": Place(RANK // 2, 2, 2, RANK % 2, 2),
}


@pytest.mark.parametrize(
    ("preset", "name"),
    quick(
        itertools.product(["2b", "14b", "30b"], LAYOUTS),
        *(("2b", name) for name in ("tp8", "ring8")),
        *(("30b", name) for name in ("ulysses8", "tp2 x ulysses2 x ring2")),
    ),
)
def test_shared_blocks_never_wait_for_the_device(preset: str, name: str) -> None:
    config, parallel = one_of_each_block(preset), LAYOUTS[name]
    whole = two_clips(config, torch.bfloat16)
    found = forward(config, parallel, whole, RANK)
    own = cut(whole, PLACES[name]).rows["video"]
    assert found.shapes == {"video": (len(own), whole.modalities["video"].latents.shape[1])}
    blocks = config.num_double_blocks + config.num_single_blocks
    assert found.messages("alltoall") == (2 * blocks if parallel.ulysses > 1 else 0)
    assert (found.messages("allgather") > 0) == (parallel.tp > 1)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(dp_shard=4, ep=4),
        ParallelConfig(dp_shard=1, cp=2, ring=2, ep=2),
        ParallelConfig(dp_shard=2, tp=2, ep=2),
    ],
    ids=str,
)
def test_experts_wait_for_counts_alone(parallel: ParallelConfig) -> None:
    pools = {"video": ExpertsConfig(num_experts=4)}
    config = dataclasses.replace(one_of_each_block("2b"), experts=pools)
    found = forward(config, parallel, two_clips(config, torch.bfloat16), 1)
    # One message of counts, and one each way of rows.
    assert found.messages("alltoall") == 3
    assert "aten::_grouped_mm" in found.ops
