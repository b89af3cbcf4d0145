"""Blocks of full width, split and shared by 8 ranks, on pretended CUDA tensors and a fake group."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from kinodit.models.exchange import Spot
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.parallel import ring, tensor
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import CutLayout, cut
from tests.cuda_fake.test_model import (
    Ops,
    on_cuda,
    one_of_each_block,
    pretend,
    two_clips,
)

RANK, WORLD = 3, 8


@pytest.fixture
def fake_world() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()


def dealt_on_cuda(batch: TokenBatch) -> TokenBatch:
    moved = on_cuda(batch)
    layout = moved.layout
    assert isinstance(layout, CutLayout)
    spots = {name: Spot(*map(pretend, spot)) for name, spot in layout.spots.items()}
    wholes = {
        name: (tokens.map(pretend), pretend(own)) for name, (tokens, own) in layout.wholes.items()
    }
    return dataclasses.replace(
        moved, layout=dataclasses.replace(layout, spots=spots, wholes=wholes)
    )


class Hop:
    """In the place of `Shift`: batched transfers ask the device driver, which is not there."""

    def __init__(self, x: Tensor, receive_shape: Sequence[int], group: object, label: str) -> None:
        self._out = x.new_empty(receive_shape)

    def wait(self) -> Tensor:
        return self._out


LAYOUTS = {
    "tp8": ParallelConfig(dp_shard=1, tp=8),
    "ulysses8": ParallelConfig(dp_shard=1, cp=8),
    "ring8": ParallelConfig(dp_shard=1, cp=8, ring=8),
    "tp2 x ulysses2 x ring2": ParallelConfig(dp_shard=1, tp=2, cp=4, ring=2),
}


@pytest.mark.parametrize("preset", ["2b", "14b", "30b"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_blocks_never_wait_for_the_device(preset: str, name: str, fake_world: None) -> None:
    config, parallel = one_of_each_block(preset), LAYOUTS[name]
    mesh = build_mesh(parallel, WORLD, RANK, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(config)
    precision = PrecisionConfig(compute="bfloat16")
    # Sharding has hooks of its own, which need a device: what it gathers is pretended below.
    alone = dataclasses.replace(mesh, device_mesh=None)
    parallelize(model, alone, parallel, precision, RematConfig(), compile_blocks=False)
    model.to(torch.bfloat16)
    whole = two_clips(config, torch.bfloat16)
    made = cut(whole, mesh.place)
    own = made.of(whole)

    def local(parameter: Tensor, *rest: object) -> Tensor:
        part: Tensor = parameter._local_tensor  # type: ignore[attr-defined]
        return torch.empty(part.shape, dtype=torch.bfloat16, device="cuda")

    with patch.object(ring, "Shift", Hop), FakeTensorMode(), torch.no_grad(), Ops() as ops:
        batch = dealt_on_cuda(own)
        if parallel.tp > 1:
            with patch.object(tensor, "_local", local):
                outputs = model(batch)
        else:
            weights = {
                key: torch.empty(x.shape, dtype=torch.bfloat16, device="cuda")
                for key, x in model.named_parameters()
            }
            outputs = torch.func.functional_call(model, weights, (batch,))
    assert outputs["video"].device.type == "cuda"
    assert outputs["video"].dtype == torch.bfloat16
    channels = whole.modalities["video"].latents.shape[1]
    assert outputs["video"].shape == (len(made.rows["video"]), channels)
    found = Counter(op.partition("::")[2] for op in ops.names if op.startswith("c10d"))
    blocks = config.num_double_blocks + config.num_single_blocks
    exchanges = sum("alltoall" in op for op in found.elements())
    assert exchanges == (2 * blocks if parallel.ulysses > 1 else 0)
    gathers = sum("allgather" in op for op in found.elements())
    assert (gathers > 0) == (parallel.tp > 1)
