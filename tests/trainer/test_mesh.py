"""Degrees of the mesh, and what context parallelism asks of a model: refused with the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.models.presets import PRESETS
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.table import check_heads


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        (ParallelConfig(), 6, (1, 6)),
        (ParallelConfig(cp=2), 8, (1, 4)),
        (ParallelConfig(dp_replicate=2, cp=2), 8, (2, 2)),
        (ParallelConfig(dp_replicate=2, dp_shard=1, cp=4, ring=2), 8, (2, 1)),
    ],
)
def test_what_remains_is_sharded(
    config: ParallelConfig, world_size: int, expected: tuple[int, int]
) -> None:
    assert config.resolve(world_size) == expected


def test_degrees_that_do_not_multiply_are_printed() -> None:
    with pytest.raises(
        ConfigError, match=r"dp_replicate=2 x dp_shard=2 x cp=2 x tp=1 = 8, but 4 process"
    ):
        ParallelConfig(dp_replicate=2, dp_shard=2, cp=2).resolve(4)
    with pytest.raises(
        ConfigError, match=r"dp_replicate=1 x cp=4 x tp=1 = 4 does not divide the 6"
    ):
        ParallelConfig(cp=4).resolve(6)
    with pytest.raises(ConfigError, match=r"parallel.ring=3 does not divide parallel.cp=4"):
        ParallelConfig(cp=4, ring=3)
    with pytest.raises(ConfigError, match=r"parallel.cp=0: must be at least 1"):
        ParallelConfig(cp=0)


def test_heads_must_divide_over_the_ranks_that_exchange_them() -> None:
    model = PRESETS["2b"]
    check_heads(model, 1, 8)
    check_heads(dataclasses.replace(model, num_kv_heads=2), 1, 8)
    with pytest.raises(ConfigError, match=r"5 ranks exchange heads; .* the 24 heads"):
        check_heads(model, 1, 5)
    with pytest.raises(ConfigError, match=r"the 3 key/value heads"):
        check_heads(dataclasses.replace(model, num_kv_heads=3), 1, 8)


def test_offloading_needs_somewhere_to_offload_from() -> None:
    config = ParallelConfig(cpu_offload=True)
    mesh = build_mesh(config, 1, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"cpu_offload=true on 1 process\(es\) and cpu"):
        parallelize(nn.Identity(), mesh, config, PrecisionConfig(), RematConfig(), False)


def test_a_negative_prefetch_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefetch=-1"):
        ParallelConfig(prefetch=-1)
