"""What is sent is on its way before the computation that it can hide behind begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from kinodit.models.mmdit import MMDiT
from kinodit.trainer.parallel import ring
from kinodit.trainer.parallel.apply import PrecisionConfig, model_blocks, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import cut
from kinodit.trainer.parallel.traffic import Traffic
from tests.support.synthetic import synthetic_pack, tiny_model_config

WORLD_SIZE = 4


@pytest.fixture
def pretended_group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=WORLD_SIZE)
    yield
    dist.destroy_process_group()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a ring, in order: "send" and "wait" of a transfer; "compute" of a partial attention."""
    found: list[str] = []

    class Watched:
        def __init__(self, x: Tensor, to: int, receive_shape: Sequence[int], *rest: object) -> None:
            found.append("send")
            self._out = x.new_zeros(receive_shape)

        def wait(self) -> Tensor:
            found.append("wait")
            return self._out

    flash = ring.FLASH["cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found.append("compute")
        return flash.forward(q, k, v)

    def backward(*parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found.append("compute")
        return flash.backward(*parts)

    monkeypatch.setattr(ring, "Transfer", Watched)
    monkeypatch.setitem(ring.FLASH, "cpu", ring.Flash(forward, backward))
    return found


def test_a_ring_sends_before_it_computes(events: list[str], pretended_group: None) -> None:
    parallel = ParallelConfig(dp_shard=1, cp=WORLD_SIZE, ring=WORLD_SIZE)
    mesh = build_mesh(parallel, WORLD_SIZE, 1, torch.device("cpu"))
    layout = cut(synthetic_pack(0, [3]), mesh.place).layout
    count = sum(layout.pieces[mesh.place.hop])
    q, k, v = (torch.ones(count, 2, 8, requires_grad=True) for _ in range(3))
    assert mesh.ring is not None
    out = ring.ring_attention(q, k, v, layout, mesh.place.hop, mesh.ring)
    assert events == [*["send", "compute", "wait"] * 3, "compute"]
    events.clear()
    out.sum().backward()
    # Keys leave first; gradients of a turn are on their way while those of the next are computed.
    assert events == [
        *("send", "compute", "wait"),
        *("send", "compute", "send", "wait"),
        *("send", "compute", "wait", "send", "wait"),
        *("compute", "wait", "send"),
        "wait",
    ]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_parameters_are_gathered_ahead(prefetch: int, pretended_group: None) -> None:
    parallel = ParallelConfig(dp_shard=WORLD_SIZE, prefetch=prefetch)
    mesh = build_mesh(parallel, WORLD_SIZE, 1, torch.device("cpu"))
    model = MMDiT(tiny_model_config(num_double_blocks=5, num_single_blocks=0))
    blocks = model_blocks(model)
    forward: list[int] = []
    backward: list[int] = []
    with Traffic() as traffic:
        for block in blocks:
            note_before(block, traffic, forward, backward)
        precision = PrecisionConfig("float64", "float64", "float64")
        parallelize(model, mesh, parallel, precision, RematConfig(), compile_blocks=False)
        outputs = model(synthetic_pack(0, [1, 2]))
        gathered = traffic.messages["fsdp", "all_gather"]
        outputs["video"].sum().backward()
    # The rest of the model, this block, and as many as come after it.
    assert forward == [1 + min(5, index + 1 + prefetch) for index in range(5)]
    assert gathered == 6
    # The last block was kept; before it come as many as are gathered ahead, at least one.
    assert backward == [6 + min(4, done + max(1, prefetch)) for done in range(5)]


def note_before(
    block: nn.Module, traffic: Traffic, forward: list[int], backward: list[int]
) -> None:
    """Note how many messages have brought parameters as the block begins to compute."""
    inner = block.forward

    def watched(x: dict[str, Tensor], context: object) -> dict[str, Tensor]:
        forward.append(traffic.messages["fsdp", "all_gather"])
        made: dict[str, Tensor] = inner(x, context)

        def on_gradient(gradient: Tensor) -> None:
            backward.append(traffic.messages["fsdp", "all_gather"])

        # The first thing that a block's backward computes is that of its last addition.
        last = made["video"]
        assert last.grad_fn is not None
        last.grad_fn.register_prehook(lambda gradients: on_gradient(gradients[0]))
        return made

    block.forward = watched
