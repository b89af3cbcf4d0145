"""Degrees of the mesh, and what context parallelism asks of a model: refused with the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from kinodit.models.errors import ConfigError
from kinodit.models.presets import PRESETS
from kinodit.trainer.parallel.apply import PrecisionConfig, check_ring, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh, placement_warning
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


def mesh_groups(rank: int, world_size: int, parallel: ParallelConfig) -> dict[str, tuple[int, ...]]:
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    groups = {
        "tp": None if mesh.tp_mesh is None else mesh.tp_mesh.get_group(),
        "heads": mesh.heads,
        "ring": mesh.ring,
        "pack": mesh.pack,
    }
    assert mesh.device_mesh is not None
    groups |= {axis: mesh.device_mesh.get_group(axis) for axis in ("dp_replicate", "dp_shard_cp")}
    return {
        name: tuple(dist.get_process_group_ranks(group))
        for name, group in groups.items()
        if group is not None
    }


@pytest.fixture
def fake_world() -> Iterator[Callable[[int, int], None]]:
    def join(rank: int, world_size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 37, 63])
def test_what_talks_most_is_nearest(rank: int, fake_world: Callable[[int, int], None]) -> None:
    """64 ranks in nodes of 8: matrices and heads inside a node, rings and shards across."""
    fake_world(rank, 64)
    parallel = ParallelConfig(dp_replicate=2, dp_shard=4, cp=4, ring=2, tp=2)
    groups = mesh_groups(rank, 64, parallel)
    first = rank - rank % 8
    assert groups["pack"] == tuple(range(first, first + 8))
    assert groups["tp"] == (rank - rank % 2, rank - rank % 2 + 1)
    half = rank - rank % 4
    assert groups["heads"] == (half + rank % 2, half + rank % 2 + 2)
    assert groups["ring"] == (first + rank % 4, first + rank % 4 + 4)
    replica = rank - rank % 32
    assert groups["dp_shard_cp"] == tuple(range(replica + rank % 2, replica + 32, 2))
    assert groups["dp_replicate"] == (rank % 32, rank % 32 + 32)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(tp=8), ""),
        (ParallelConfig(tp=2, cp=4), ""),
        (ParallelConfig(dp_replicate=2, dp_shard=16), ""),
        (ParallelConfig(tp=16), "parallel.tp=16 do not fit evenly into a node of 8"),
        (ParallelConfig(tp=3), "parallel.tp=3 do not fit evenly into a node of 8"),
        (ParallelConfig(tp=4, cp=4), "parallel.tp=4 x 4 ranks that exchange heads = 16 ranks"),
        (ParallelConfig(tp=4, cp=4, ring=2), "parallel.tp=4 x cp=4 = 16 ranks do not fit"),
        (ParallelConfig(cp=16, ring=4), "parallel.tp=1 x cp=16 = 16 ranks do not fit"),
    ],
)
def test_an_axis_that_leaves_its_node_is_told_with_its_numbers(
    parallel: ParallelConfig, expected: str
) -> None:
    said = placement_warning(parallel, 8)
    assert said.startswith(expected) and bool(said) == bool(expected)
    assert placement_warning(parallel, 0) == ""


def test_heads_must_divide_over_the_ranks_that_exchange_them() -> None:
    model = PRESETS["2b"]
    check_heads(model, 1, 8)
    check_heads(dataclasses.replace(model, num_kv_heads=2), 1, 8)
    with pytest.raises(ConfigError, match=r"5 ranks exchange heads; .* the 24 heads"):
        check_heads(model, 1, 5)
    with pytest.raises(ConfigError, match=r"the 3 key/value heads"):
        check_heads(dataclasses.replace(model, num_kv_heads=3), 1, 8)


def test_a_ring_on_cuda_needs_a_kernel_that_tells_its_sum() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    check_ring(64, torch.bfloat16, cuda)
    check_ring(12, torch.float64, cpu)
    for head_dim, dtype in ((64, torch.float32), (12, torch.bfloat16), (264, torch.bfloat16)):
        with pytest.raises(ConfigError, match=rf"parallel.ring on CUDA .* and {head_dim}: change"):
            check_ring(head_dim, dtype, cuda)


def test_offloading_needs_somewhere_to_offload_from() -> None:
    config = ParallelConfig(cpu_offload=True)
    mesh = build_mesh(config, 1, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"cpu_offload=true on 1 process\(es\) and cpu"):
        parallelize(nn.Identity(), mesh, config, PrecisionConfig(), RematConfig(), False)


def test_a_negative_prefetch_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefetch=-1"):
        ParallelConfig(prefetch=-1)
