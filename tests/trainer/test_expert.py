"""Experts dealt out to ranks: what is refused, what is sent, and in which order rows are seen."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.moe.experts import Beside, Experts
from kinodit.models.moe.layer import MoE, Surroundings
from kinodit.models.moe.router import Seen
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.collectives import Journey
from kinodit.trainer.parallel.expert import COUNTS, EXPERTS, ExpertExchange, by_expert
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.traffic import Traffic, listening
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

WIDTH, HIDDEN = 8, 16
COUNTS_OF_RANKS = ([5, 0, 2, 1], [0, 0, 0, 9])
"""Rows for each of four experts, of which each rank has two. The second has none at all."""


def test_rows_that_came_by_rank_are_put_in_the_order_of_experts() -> None:
    order = by_expert(torch.tensor([[2, 1], [1, 0], [0, 2]]), 6)
    assert order.tolist() == [0, 1, 3, 2, 4, 5]
    assert by_expert(torch.zeros(3, 2, dtype=torch.int64), 0).tolist() == []


def whole_experts() -> Experts:
    experts = Experts(4, WIDTH, HIDDEN, "swiglu", bias=True).double()
    source = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
    return experts


def rows_of(rank: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(rank + 1)
    count = sum(COUNTS_OF_RANKS[rank])
    return torch.randn(count, WIDTH, generator=source, dtype=torch.float64).requires_grad_()


def exchanged(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """What each rank gets for its rows, their gradient, and the bytes that it received."""
    mesh = build_mesh(ParallelConfig(ep=2), world_size, rank, torch.device("cpu"))
    assert mesh.expert_mesh is not None
    mine = Experts(2, WIDTH, HIDDEN, "swiglu", bias=True).double()
    for ours, whole in zip(mine.parameters(), whole_experts().parameters(), strict=True):
        ours.data = whole.data[2 * rank : 2 * rank + 2]
    x = rows_of(rank)
    with Traffic() as traffic:
        apply = ExpertExchange(mesh.expert_mesh.get_group("ep"))
        out, beside = apply(mine, x, torch.tensor(COUNTS_OF_RANKS[rank]))
        out.backward(torch.ones_like(out))
    assert x.grad is not None and beside is None
    received = {label: traffic.total(label)[1] for label in traffic.labels}
    return out.detach(), x.grad, received


@pytest.mark.gloo
def test_rows_travel_to_their_experts_and_back_and_nothing_else_does(two: Ranks) -> None:
    experts = whole_experts()
    for rank, (out, grad, received) in enumerate(two.run(exchanged)):
        x = rows_of(rank)
        expected = experts(x, torch.tensor(COUNTS_OF_RANKS[rank]))
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, x.grad, rtol=1e-12, atol=1e-12)
        sent = sum(COUNTS_OF_RANKS[rank][2:] if rank == 0 else COUNTS_OF_RANKS[rank][:2])
        arrived = sum(COUNTS_OF_RANKS[1][:2] if rank == 0 else COUNTS_OF_RANKS[0][2:])
        assert received[EXPERTS] == 2 * (sent + arrived) * WIDTH * 8
        assert received[COUNTS] == 2 * 8


def laid_out(rank: int, world_size: int, num_experts: int) -> str:
    """What a layout with experts on two ranks is refused with; "" if it is not."""
    experts = {"video": ExpertsConfig(num_experts, 1)} if num_experts else {}
    parallel = ParallelConfig(ep=2)
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(tiny_model_config(experts=experts))
    try:
        parallelize(model, mesh, parallel, PrecisionConfig(), RematConfig(), compile_blocks=False)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_what_cannot_be_dealt_out_is_refused(two: Ranks) -> None:
    assert two.run(laid_out, 4) == ["", ""]
    assert "the model has no experts" in two.run(laid_out, 0)[0]
    assert "does not divide the 3 experts of joint_blocks.0" in two.run(laid_out, 3)[1]


def test_experts_need_ranks_with_tokens_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep=4 must divide .*dp_shard=1 x cp=2 = 2"):
        build_mesh(ParallelConfig(dp_shard=1, cp=2, tp=2, ep=4), 4, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"parallel\.ep=0"):
        ParallelConfig(ep=0)


class Sequential:
    """An `ExpertOp` that sends, waits, and only then computes what could be done beside."""

    def __init__(self, group: ProcessGroup) -> None:
        self._apply = ExpertExchange(group)

    def __call__(
        self, experts: nn.Module, x: Tensor, counts: Tensor, beside: Beside | None = None
    ) -> tuple[Tensor, Tensor | None]:
        out, _ = self._apply(experts, x, counts)
        return out, None if beside is None else beside()


@dataclass
class Watched:
    """What a layer with a shared expert gave on a rank, and in which order it worked."""

    out: Tensor
    gradients: dict[str, Tensor]
    forward: list[str]
    backward: list[str]


def shared_beside(rank: int, world_size: int, sequential: bool) -> Watched:
    """Forward and backward of one layer, whose events are noted."""
    mesh = build_mesh(ParallelConfig(ep=2), world_size, rank, torch.device("cpu"))
    assert mesh.expert_mesh is not None
    config = ExpertsConfig(4, 2, 1.0, 1.0)
    layer = MoE(WIDTH, config, "swiglu", bias=True)
    source = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source)
    half = slice(2 * rank, 2 * rank + 2)
    for name, whole in layer.experts.named_parameters():
        layer.experts.register_parameter(name, nn.Parameter(whole.detach()[half].clone()))
    group = mesh.expert_mesh.get_group("ep")
    apply = Sequential(group) if sequential else ExpertExchange(group)
    source.manual_seed(rank)
    x = torch.randn(16, WIDTH, generator=source).requires_grad_()
    level_t = torch.zeros(16)
    events: list[str] = []
    wait = Journey.wait

    def noted_wait(journey: Journey) -> Tensor:
        events.append("wait")
        return wait(journey)

    def heard(label: str, kind: str, num_bytes: int) -> None:
        events.append(label)

    assert layer.shared is not None
    layer.shared.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared.register_full_backward_hook(lambda *_: events.append("shared"))
    with mock.patch.object(Journey, "wait", noted_wait), listening(heard):
        out = layer(x, Surroundings(Seen(level_t), level_t, lambda seen: seen, apply))
        forward, events = events, []
        out.square().sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return Watched(out.detach(), {**gradients, "x": x.grad}, forward, events)


@pytest.mark.gloo
def test_the_shared_expert_is_computed_while_rows_travel(two: Ranks) -> None:
    """There and, with its backward, on the way back; to the last bit as one after the other."""
    apart = two.run(shared_beside, True)
    for found, expected in zip(two.run(shared_beside, False), apart, strict=True):
        assert torch.equal(found.out, expected.out)
        assert found.gradients.keys() == expected.gradients.keys()
        assert len(found.gradients) > 10
        for name, gradient in expected.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name
        assert found.forward == [COUNTS, EXPERTS, "shared", "wait", EXPERTS]
        assert found.backward == [EXPERTS, EXPERTS, "shared", "wait"]
        assert expected.forward == [COUNTS, EXPERTS, "wait", EXPERTS, "shared"]
