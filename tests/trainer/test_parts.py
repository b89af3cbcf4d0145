"""Parts of a tensor and the whole: as DTensor itself has them, on every mesh and in odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.parts import local_part, spread, whole
from tests.support.laid_out import CPU, PARALLELS, laid_out
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

DEALT = ParallelConfig(tp=2, ep=2)
CONFIG = tiny_model_config(num_heads=4, experts={"video": ExpertsConfig(4, 2, 1.0)})


def wrong(rank: int, world_size: int, parallel: ParallelConfig) -> list[str]:
    """Names of parameters whose parts or whole differ from DTensor's own."""
    model = laid_out(rank, world_size, parallel, CONFIG)
    found = []
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        again = spread(local_part(parameter).detach().clone(), parameter)
        assert isinstance(again, DTensor) and not again.requires_grad
        same = (
            again.placements == parameter.placements
            and again.shape == parameter.shape
            and again.stride() == parameter.stride()
            and torch.equal(whole(again), parameter.full_tensor())
        )
        if not same:
            found.append(name)
    return found


def test_some_rows_do_not_divide_evenly() -> None:
    # 6 rows are 2, 2, 2 and none.
    assert any(p.shape[0] == 6 for p in MMDiT(CONFIG).parameters())


@pytest.mark.gloo
@pytest.mark.parametrize(
    "parallel",
    quick([*PARALLELS, DEALT], ParallelConfig(tp=2, dp_replicate=2), ParallelConfig(tp=4), DEALT),
    ids=str,
)
def test_they_are_those_of_dtensor(parallel: ParallelConfig, four: Ranks) -> None:
    assert four.run(wrong, parallel) == [[]] * 4


def other(rank: int, world_size: int) -> tuple[torch.Size, torch.dtype, float]:
    """A tensor of another shape and format that lies as a parameter does."""
    mesh = build_mesh(ParallelConfig(), world_size, rank, CPU)
    model = torch.nn.Linear(6, 5, bias=False)
    assert mesh.device_mesh is not None
    lies = torch.distributed.tensor.distribute_tensor(
        model.weight, mesh.device_mesh, [torch.distributed.tensor.Shard(0)] * mesh.device_mesh.ndim
    )
    rows = local_part(lies).shape[0]
    made = spread(torch.full((rows, 2), rank + 1, dtype=torch.uint8), lies, (5, 2))
    return made.shape, made.dtype, float(whole(made).double().sum())


@pytest.mark.gloo
def test_a_tensor_of_another_shape_lies_alike(two: Ranks) -> None:
    # 3 rows here and 2 there.
    assert two.run(other) == [(torch.Size((5, 2)), torch.uint8, 2.0 * (3 * 1 + 2 * 2))] * 2


def test_what_is_not_sharded_is_itself() -> None:
    plain = torch.arange(3.0)
    assert spread(plain, torch.zeros(3)) is plain
    assert whole(plain).data_ptr() == plain.data_ptr() == local_part(plain).data_ptr()
