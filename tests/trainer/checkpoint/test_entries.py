"""What DCP would lose without a word is refused, on all ranks, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kinodit.trainer import checkpoint
from kinodit.trainer.checkpoint.entries import check_entries
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig, build_mesh
from kinodit.trainer.state import CheckpointError, TrainState
from tests.support.checkpoints import MESH
from tests.support.ranks import Ranks

pytestmark = pytest.mark.gloo


def mesh_of(rank: int, world_size: int) -> Mesh:
    return build_mesh(ParallelConfig(), world_size, rank, torch.device("cpu"))


def entries(rank: int, kind: str) -> dict[str, Tensor]:
    mine = torch.full((4,), float(rank))
    return {
        "differs": {"w": mine, "same": torch.ones(2)},
        "other shape": {"w": torch.zeros(4 + rank)},
        "on one rank": {"w": mine} if rank else {},
        "other's name": {f"rank{1 - rank}/w": mine},
        "same": {"w": torch.ones(4)},
        "own name": {f"rank{rank}/w": mine},
    }[kind]


def check(rank: int, world_size: int, kind: str) -> str:
    try:
        check_entries(entries(rank, kind), mesh_of(rank, world_size))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["differs", "other shape", "on one rank", "other's name"])
def test_what_would_be_lost_is_refused_on_all_ranks(kind: str, two: Ranks) -> None:
    said = two.run(check, kind)
    assert said[0] == said[1] and "make it a DTensor" in said[0]
    assert "w" in said[0] and "same" not in said[0].split(" between")[0]


@pytest.mark.parametrize("kind", ["same", "own name"])
def test_what_is_kept_is_let_pass(kind: str, two: Ranks) -> None:
    assert two.run(check, kind) == ["", ""]


def save_sharded(rank: int, world_size: int, folder: Path, mode: str) -> bool:
    mesh = mesh_of(rank, world_size)
    assert mesh.device_mesh is not None
    parts = mesh.device_mesh["dp_shard_cp"]
    whole = torch.arange(21.0).view(7, 3)
    tensors = {
        "model/sharded": distribute_tensor(whole, parts, [Shard(0)]),
        "model/replicated": distribute_tensor(whole + 1, parts, [Replicate()]),
        f"rank{rank}/own": torch.full((2,), float(rank)),
    }
    saver = checkpoint.Saver(folder, checkpoint.CheckpointConfig(mode=mode), mesh, {})  # type: ignore[arg-type]
    saver.save(TrainState(1, 1, 1, "p"), tensors)
    saver.wait_for_copy()
    for tensor in tensors.values():
        tensor.zero_()  # the next update
    (outcome,) = saver.drain() if mode == "async" else [saver.last]
    saver.close()
    assert outcome is not None and not outcome.failure, outcome
    checkpoint.load(outcome.path, tensors, mesh)
    distributed = tensors["model/sharded"]
    assert isinstance(distributed, DTensor)
    return bool((distributed.full_tensor() == whole).all())


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_saved_as_sharded_read_whole(mode: str, two: Ranks, tmp_path: Path) -> None:
    assert two.run(save_sharded, tmp_path, mode) == [True, True]
    (path,) = checkpoint.find_checkpoints(tmp_path)
    whole = torch.arange(21.0).view(7, 3)
    loaded = {
        "model/sharded": torch.zeros(7, 3),
        "model/replicated": torch.zeros(7, 3),
        "rank0/own": torch.ones(2),
        "rank1/own": torch.zeros(2),
    }
    checkpoint.load(path, loaded, MESH)
    assert torch.equal(loaded["model/sharded"], whole)
    assert torch.equal(loaded["model/replicated"], whole + 1)
    assert loaded["rank0/own"].tolist() == [0, 0] and loaded["rank1/own"].tolist() == [1, 1]
