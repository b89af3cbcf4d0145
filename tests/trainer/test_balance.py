"""Balancing experts: what moves, when, and that it works on a skewed stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.moe.experts import apply_experts
from kinodit.models.moe.layer import MoE, Surroundings
from kinodit.models.moe.prior import prior_shares, task_levels
from kinodit.models.moe.router import Seen
from kinodit.models.moe.tally import Load, Sums, Tally
from kinodit.trainer.balance import Balance, report
from kinodit.trainer.metrics import Window
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.step import NUM_NOISE_BINS, StepCounts, StepResult
from tests.support.quick import quick
from tests.support.synthetic import synthetic_pack

WIDTH, NUM_EXPERTS, NUM_TOKENS = 16, 8, 512
NUM_STEPS, LAST = 300, 50
NUM_PACKED = sum(tokens.num_tokens for tokens in synthetic_pack(0, [0]).modalities.values())
"""Tokens of the pack that stands for the stream's where only their number counts."""
MESH = Mesh(torch.device("cpu"))


def no_gradients(names: Sequence[str]) -> Tensor:
    return torch.zeros(len(names))


def forward(layer: MoE, x: Tensor) -> Tensor:
    level_t = torch.zeros(len(x))
    out: Tensor = layer(x, Surroundings(Seen(level_t), level_t, lambda seen: seen, apply_experts))
    return out


def skewed_tokens(step: int) -> Tensor:
    """Half of all tokens lie near one point, and the others near 15 others."""
    source = torch.Generator().manual_seed(step)
    points = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    which = torch.randint(-15, 16, (NUM_TOKENS,), generator=source).clamp(min=0)
    return points[which] + 0.5 * torch.randn(NUM_TOKENS, WIDTH, generator=source)


def largest_load(balance: str) -> float:
    """The largest load over the mean in the last steps of learning to double the tokens."""
    router = RouterConfig(balance=balance, loss_weight=4.0, bias_rate=0.005)  # type: ignore[arg-type]
    torch.manual_seed(0)
    layer = MoE(WIDTH, ExpertsConfig(NUM_EXPERTS, 2, 1.0, router=router), "silu", bias=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.25)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    balancing = Balance(nn.ModuleList([layer]), MESH)
    total = torch.zeros(())
    for step in range(NUM_STEPS):
        balancing.begin([synthetic_pack(0, [0])])
        layer.loss_scale *= NUM_PACKED / NUM_TOKENS
        x = skewed_tokens(step)
        (forward(layer, x) - 2 * x).square().mean().backward()
        (tally,) = balancing.count(no_gradients).values()
        optimizer.step()
        optimizer.zero_grad()
        balancing.update()
        if step >= NUM_STEPS - LAST:
            total = total + tally.values
    return 1 + Load.of(total.tolist()).violation


@pytest.mark.parametrize("balance", quick(["loss", "bias"], "loss"))
def test_a_skewed_stream_is_balanced(balance: str) -> None:
    assert largest_load(balance) <= 1.1


def test_without_balancing_it_collapses() -> None:
    assert largest_load("none") > 2


def test_corrections_move_towards_experts_with_less_than_the_mean() -> None:
    router = RouterConfig(balance="bias", bias_rate=0.5, renormalise=False)
    layer = MoE(WIDTH, ExpertsConfig(3, 1, 1.0, router=router), "silu", bias=False)
    balancing = Balance(nn.ModuleList([layer]), MESH)
    balancing.begin([synthetic_pack(0, [0])])
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.router.correction[1] = 0.1
    forward(layer, torch.ones(4, WIDTH)).sum().backward()
    (tally,) = balancing.count(no_gradients).values()
    assert Load.of(tally.values.tolist()).by_expert == [0, 4, 0]
    assert layer.router.correction.tolist() == pytest.approx([0, 0.1, 0])
    balancing.update()
    assert layer.router.correction.tolist() == pytest.approx([0.5, -0.4, 0.5])
    assert layer.router.load.tolist() == [0, 1, 0]


def test_a_prior_sends_neighbouring_levels_to_experts_that_they_share() -> None:
    """Two layers learn from the prior alone, and most levels get the experts that it says."""
    router = RouterConfig("timestep", balance="prior", loss_weight=1.0)
    config = ExpertsConfig(4, 2, 1.0, router=router)
    torch.manual_seed(1)
    pool = nn.ModuleList([MoE(WIDTH, config, "silu", False, WIDTH) for _ in range(2)])
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.Adam(pool.parameters(), lr=0.03)
    balancing = Balance(pool, MESH)
    layers = [layer for layer in pool if isinstance(layer, MoE)]
    level_t = torch.linspace(0, 1, 64)
    levels = torch.cat([level_t, task_levels(torch.device("cpu"))]).unsqueeze(-1)
    time = torch.cos(torch.arange(WIDTH) * math.pi * levels)
    seen = Seen(level_t, level=torch.arange(64), time=time[:64], tasks=time[64:])
    around = Surroundings(seen, level_t, lambda seen: seen, apply_experts)
    matched = []
    for _ in range(200):
        balancing.begin([synthetic_pack(0, [0])])
        for layer in layers:
            layer.loss_scale *= NUM_PACKED / 64
            out = layer(torch.zeros(64, WIDTH), around)
            (0.0 * out.sum()).backward()
        balancing.count(no_gradients)
        optimizer.step()
        optimizer.zero_grad()
        balancing.update()
        matched.append([layer.router.unit.tolist() for layer in layers])
    assert sorted(matched[-1][0] + matched[-1][1]) == list(range(8))
    assert matched[0] != [[0, 1, 2, 3], [4, 5, 6, 7]] and matched[-1] == matched[-20]
    for layer in layers:
        prior = prior_shares(task_levels(torch.device("cpu")), layer.router.unit, 8, 4)
        assert layer.router.masks is not None
        agree = (layer.router.masks == (prior > 0)).double().mean()
        assert agree > 0.8


def tally_of(
    counts: list[list[float]],
    entropy: float,
    squares: float,
    dropped: float = 0.0,
    gradient: float = 0.0,
) -> Tensor:
    """A tally of two experts with these counts in the first bins of the noise level."""
    cells = [count for row in counts for count in row] + [0.0] * (20 - 2 * len(counts))
    shares = [sum(column) for column in zip(*counts, strict=True)]
    return torch.tensor([*cells, *shares, dropped, entropy, squares, gradient], dtype=torch.float64)


def test_a_report_says_how_far_from_even_and_how_sure() -> None:
    even = tally_of([[2.0, 2.0]], 4 * math.log(2), 0.0)
    skewed = tally_of([[3.0, 1.0]], 0.0, 8.0, dropped=1.0, gradient=18.0)
    row = report({"a": Sums(even, ("",)), "b": Sums(skewed, ("",))}, num_steps=2)
    assert row["moe/violation"] == 0.5
    assert row["moe/entropy"] == pytest.approx(0.5)
    layers = row["experts"]
    assert isinstance(layers, dict)
    assert layers["b"]["load"] == [1.5, 0.5]
    assert layers["b"]["noise_bins"] == [[1.5, 0.5], *[[]] * 9]
    assert layers["b"]["z"] == 2.0
    assert layers["b"]["dropped"] == 0.25
    assert row["moe/dropped"] == 0.125
    assert row["moe/router_grad_norm"] == layers["b"]["router_grad_norm"] == 3.0
    assert "modalities" not in layers["b"]
    assert report({}, 0) == {}


def test_a_report_tells_streams_and_noise_levels_apart() -> None:
    tally = Tally(2, ("text", "video"))
    index, stream = torch.tensor([[0], [0], [1], [0]]), torch.tensor([0, 1, 1, 1])
    level_t = torch.tensor([0.05, 0.05, 0.95, 0.95])
    shares = torch.full((4, 2), 0.5)
    tally.add(tally.count(index, None, shares, torch.zeros(()), level_t, stream))
    row = report({"a": Sums(tally.take(torch.device("cpu")), tally.streams)}, 1)
    layers = row["experts"]
    assert isinstance(layers, dict)
    assert layers["a"]["modalities"] == {"text": [2.0, 0.0], "video": [1.3333, 0.6667]}
    assert layers["a"]["noise_bins"] == [[2.0, 0.0], *[[]] * 8, [1.0, 1.0]]
    assert layers["a"]["load"] == [1.5, 0.5]


def test_the_norm_of_routers_gradients_is_of_all_their_parameters() -> None:
    config = ExpertsConfig(3, 2, 1.0, router=RouterConfig(hidden_ratio=1.0))
    layer = MoE(WIDTH, config, "silu", bias=False)
    balancing = Balance(nn.ModuleList([layer]), MESH)
    balancing.begin([synthetic_pack(0, [0])])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    forward(layer, torch.ones(4, WIDTH)).sum().backward()

    def squares(names: Sequence[str]) -> Tensor:
        assert sorted(names) == ["0.router.hidden", "0.router.hidden_bias", "0.router.weight"]
        return torch.tensor([1.0, 2.0, 4.0])

    assert balancing.count(squares)["0"].values[-1] == 7


def test_rows_leave_out_steps_that_did_not_update() -> None:
    none = torch.zeros(1, NUM_NOISE_BINS, dtype=torch.float64)
    counts, loss = StepCounts({"video": 1}, 2, 1), torch.ones(1, dtype=torch.float64)
    window = Window(["video"])
    for updated, gradient in ((True, 4.0), (False, math.nan), (True, 14.0)):
        tally = tally_of([[3.0, 1.0]], 0.0, 0.0, gradient=gradient)
        loads = {"a": Sums(tally, ("",))}
        result = StepResult(loss, none, none, torch.ones(()), counts, updated, loads)
        window.add(result, num_tokens=2, num_samples=1, flops=1.0)
    row = window.row(3, lr=1e-3, mesh=MESH, peak=1.0, loss_weights={})
    assert row["moe/router_grad_norm"] == 3.0 and row["moe/violation"] == 0.5
