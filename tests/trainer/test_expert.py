"""Experts dealt out to ranks: what is refused, what is sent, and in which order rows are seen."""

from __future__ import annotations

import pytest
import torch

from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.moe.experts import Experts
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.expert import COUNTS, EXPERTS, ExpertExchange, by_expert
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.traffic import Traffic
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
        out = apply(mine, x, torch.tensor(COUNTS_OF_RANKS[rank]))
        out.backward(torch.ones_like(out))
    assert x.grad is not None
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
