"""Experts, routers and their layer, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.errors import ConfigError
from kinodit.models.mlp import MLP
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.moe.experts import (
    Experts,
    apply_experts,
    fits_grouped,
    grouped_product,
    looped_product,
)
from kinodit.models.moe.layer import MoE, Surroundings
from kinodit.models.moe.router import Seen, best, best_of_sample
from kinodit.models.moe.tally import Load
from tests.models.packs import randomize
from tests.support.synthetic import tiny_model_config

WIDTH = 16


def around(num_tokens: int, level_t: Tensor | None = None) -> Surroundings:
    level_t = torch.rand(num_tokens) if level_t is None else level_t
    sample = torch.arange(num_tokens) % 2
    seen = Seen(level_t, segment=sample, num_segments=3)
    return Surroundings(seen, level_t, lambda seen: seen, apply_experts)


def layer_of(config: ExpertsConfig, dtype: torch.dtype = torch.float64) -> MoE:
    layer = MoE(WIDTH, config, "swiglu", bias=True).to(dtype)
    randomize(layer)
    return layer


def tokens(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(num), dtype=dtype)
    return drawn.requires_grad_()


def expert(layer: MoE, index: int) -> MLP:
    """One expert as a feed-forward of its own."""
    experts = layer.experts
    made = MLP(WIDTH, experts.up.shape[1], "swiglu", bias=True).to(experts.up.dtype)
    for name in ("up", "gate", "down"):
        linear: nn.Linear = getattr(made, name)
        linear.weight.data = getattr(experts, name)[index].detach().clone()
        linear.bias.data = getattr(experts, f"{name}_bias")[index].detach().clone()
    return made


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_each_token_gets_the_weighted_sum_of_its_experts(scores: str, renormalise: bool) -> None:
    router = RouterConfig(scores=scores, renormalise=renormalise, scale=1.5)  # type: ignore[arg-type]
    layer = layer_of(ExpertsConfig(5, 2, 1.0, 0.5, router=router))
    layer.router.correction.copy_(torch.tensor([0.0, 9.0, 0.0, -9.0, 0.0]))
    x = tokens(7)
    assert layer.router.weight is not None and layer.shared is not None
    logits = x.detach() @ layer.router.weight.detach().t()
    value = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    expected = []
    for row, score in zip(x, value, strict=True):
        chosen = sorted(range(5), key=lambda e: -float(score[e] + layer.router.correction[e]))[:2]
        assert 1 in chosen and 3 not in chosen
        total = sum(float(score[e]) for e in chosen) if renormalise else 1.0
        parts = [1.5 * score[e] / total * expert(layer, e)(row) for e in chosen]
        expected.append(sum(parts) + layer.shared(row))
    torch.testing.assert_close(layer(x, around(7)), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = layer_of(ExpertsConfig(3, 2, 0.5))
    layer.loss_scale = layer.z_scale = 0.0
    x = tokens(4)
    places = around(4)
    assert torch.autograd.gradcheck(lambda x: layer(x, places), (x,))


def test_equal_experts_are_one_feed_forward() -> None:
    layer = layer_of(ExpertsConfig(4, 2, 1.0))
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = tokens(9)
    torch.testing.assert_close(layer(x, around(9)), expert(layer, 0)(x), rtol=1e-12, atol=1e-12)


EXPERTS_CHOOSE = RouterConfig(choice="expert", balance="none", renormalise=False, scale=1.5)


def chosen_by_experts(layer: MoE, scores: Tensor) -> dict[tuple[int, int], float]:
    """(token, expert) -> gate, by the definition: sample by sample, expert by expert."""
    pairs = {}
    for sample in range(2):
        mine = list(range(sample, len(scores), 2))
        for e in range(layer.config.num_experts):
            ranked = sorted(mine, key=lambda token: -float(scores[token, e]))
            num = math.ceil(layer.config.top_k * len(mine) / layer.config.num_experts)
            pairs.update({(token, e): 1.5 * float(scores[token, e]) for token in ranked[:num]})
    return pairs


def kept_of_chosen(layer: MoE, scores: Tensor) -> dict[tuple[int, int], float]:
    """(token, expert) -> gate: each token's best experts, of which each keeps its best tokens."""
    asked: dict[tuple[int, int], list[tuple[float, int]]] = {}
    gates = {}
    for token, row in enumerate(scores.tolist()):
        experts = sorted(range(len(row)), key=lambda e: -row[e])[: layer.config.top_k]
        for e in experts:
            asked.setdefault((token % 2, e), []).append((-row[e], token))
            gates[token, e] = 1.5 * row[e] / sum(row[e] for e in experts)
    share = layer.router.config.capacity_factor * layer.config.top_k / layer.config.num_experts
    kept = {}
    for (sample, e), tokens in asked.items():
        num = math.ceil(share * len(range(sample, len(scores), 2)))
        kept.update({(token, e): gates[token, e] for _, token in sorted(tokens)[:num]})
    return kept


@pytest.mark.parametrize(
    ("top_k", "router", "expected_pairs"),
    [
        (1, EXPERTS_CHOOSE, chosen_by_experts),
        (2, RouterConfig(capacity_factor=1.0, scale=1.5), kept_of_chosen),
    ],
    ids=["experts choose", "capacity"],
)
def test_experts_that_take_some_tokens_of_each_sample(
    top_k: int,
    router: RouterConfig,
    expected_pairs: Callable[[MoE, Tensor], dict[tuple[int, int], float]],
) -> None:
    layer = layer_of(ExpertsConfig(5, top_k, 1.0, router=router))
    num = 41
    x = (tokens(num) + 3 * tokens(1)).detach().requires_grad_()
    assert layer.router.weight is not None
    layer.router.weight.data *= 4
    scores = (x.detach() @ layer.router.weight.detach().t()).softmax(-1)
    pairs = expected_pairs(layer, scores)
    assert len({token for token, _ in pairs}) < num, "every token has an expert"
    expected = torch.zeros_like(x)
    for (token, e), gate in pairs.items():
        expected[token] += gate * expert(layer, e)(x[token])
    out = layer(x, around(num))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    load = Load.of(layer.tally.take(torch.device("cpu")).tolist())
    assert load.by_expert == [sum(e == one for _, e in pairs) for one in range(5)]
    assert load.dropped == num - len({token for token, _ in pairs})


@pytest.mark.parametrize("router", [EXPERTS_CHOOSE, RouterConfig(capacity_factor=1.0)])
def test_gradients_where_tokens_have_different_numbers_of_experts(router: RouterConfig) -> None:
    layer = layer_of(ExpertsConfig(3, 2, 0.5, router=router))
    x, places = tokens(6), around(6)
    assert torch.autograd.gradcheck(lambda x: layer(x, places), (x,))


def test_a_capacity_that_nothing_exceeds_changes_nothing() -> None:
    x, places = tokens(12), around(12)
    layer = layer_of(ExpertsConfig(4, 2, 1.0))
    limited = layer_of(ExpertsConfig(4, 2, 1.0, router=RouterConfig(capacity_factor=2.0)))
    limited.load_state_dict(layer.state_dict())
    torch.testing.assert_close(limited(x, places), layer(x, places), rtol=1e-12, atol=1e-12)


def test_of_tokens_that_score_alike_experts_take_the_first_of_each_sample() -> None:
    sample = torch.tensor([1, 0, 0, 1, 0, 0, 1])
    kept = best_of_sample(torch.zeros(7, 2), sample, 0.5, 3)
    assert kept[:, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert best_of_sample(torch.zeros(0, 2), sample[:0], 0.5, 3).shape == (0, 2)


def test_equal_scores_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0]]).repeat(70, 1)
    assert best(scores, 2).tolist() == [[1, 2]] * 70
    assert best(torch.zeros(3, 64), 3).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_loop(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(1)
    counts = torch.tensor([3, 0, 11, 1, 0])
    x = torch.randn(15, 16, generator=source).to(dtype)
    weight = torch.randn(5, 24, 16, generator=source).to(dtype)
    grad = torch.randn(15, 24, generator=source).to(dtype)
    assert fits_grouped(x, weight)
    made = []
    for product in (grouped_product, looped_product):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(*inputs, counts)
        out.backward(grad)
        made.append((out, inputs[0].grad, inputs[1].grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert made[0][2] is not None and not made[0][2][1].any()


def test_what_has_no_grouped_product_goes_by_the_loop() -> None:
    weight = torch.zeros(2, 16, 16)
    assert not fits_grouped(torch.zeros(1, 16).double(), weight.double())
    assert not fits_grouped(torch.zeros(1, 10), torch.zeros(2, 16, 10))


@pytest.mark.parametrize("router", [RouterConfig(), EXPERTS_CHOOSE])
def test_no_tokens_at_all(router: RouterConfig) -> None:
    layer = layer_of(ExpertsConfig(4, 2, 1.0, 1.0, router=router), torch.float32)
    layer.loss_scale = layer.z_scale = 1.0
    x = tokens(0, torch.float32)
    made = layer(x, around(0))
    made.backward(torch.zeros_like(made))
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_auxiliary_losses_are_sums_over_tokens() -> None:
    layer = layer_of(ExpertsConfig(4, 2, 1.0))
    layer.router.load.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    layer.loss_scale, layer.z_scale = 0.3, 0.2
    x = tokens(6)
    layer(x, around(6)).backward(torch.zeros(6, WIDTH, dtype=x.dtype))
    weight = layer.router.weight
    assert weight is not None and weight.grad is not None
    again = weight.detach().clone().requires_grad_()
    logits = x @ again.t()
    aux = 0.3 * (logits.softmax(-1) * layer.router.load).sum()
    (aux + 0.2 * logits.logsumexp(-1).square().sum()).backward()
    torch.testing.assert_close(weight.grad, again.grad, rtol=1e-12, atol=1e-12)


def test_each_pass_with_a_backward_is_counted_once() -> None:
    layer = layer_of(ExpertsConfig(4, 2, 1.0))
    level_t = torch.tensor([0.05, 0.05, 0.95, 1.0])
    x = tokens(4)
    with torch.no_grad():
        layer(x, around(4, level_t))

    def forward(x: Tensor) -> Tensor:
        out: Tensor = layer(x, around(4, level_t))
        return out

    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).sum().backward()
    load = Load.of(layer.tally.take(torch.device("cpu")).tolist())
    assert sum(load.by_expert) == 8 and load.num_tokens == pytest.approx(4)
    assert [sum(row) for row in load.counts] == [4, 0, 0, 0, 0, 0, 0, 0, 0, 4]
    assert 0 < load.entropy < 4 * torch.tensor(4.0).log()
    assert not layer.tally.take(torch.device("cpu")).any()


def test_violation_is_the_largest_load_over_the_mean() -> None:
    one = Load(("",), ((3.0, 1.0), (3.0, 1.0)), (4.0, 4.0), 0.0, 0.0, 0.0, 0.0)
    assert one.violation == 0.5
    assert one.by_expert == [6.0, 2.0]


def test_experts_of_noise_levels_see_theirs_alone() -> None:
    layer = layer_of(ExpertsConfig(2, 1, 1.0, router=RouterConfig("noise_level")))
    level_t = torch.tensor([0.0, 0.49, 0.5, 1.0])
    x = tokens(4)
    made = layer(x, around(4, level_t))
    for row, index in enumerate([0, 0, 1, 1]):
        torch.testing.assert_close(made[row], expert(layer, index)(x[row]))


def test_a_router_stays_in_float32_under_autocast() -> None:
    layer = layer_of(ExpertsConfig(4, 2, 1.0), torch.float32)
    x = tokens(5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        choice = layer.router(x, Seen(torch.rand(5)))
        out = layer(x, around(5))
    assert layer.router.weight is not None
    torch.testing.assert_close(choice.logits, F.linear(x, layer.router.weight), rtol=0, atol=0)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k = 9"),
        ({"top_k": 2, "router": RouterConfig("modality")}, "router.kind = modality"),
        ({"expert_ratio": 0.0}, "expert_ratio"),
        ({"top_k": 1, "router": RouterConfig(balance="bias")}, "makes every gate 1"),
    ],
)
def test_experts_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertsConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity_factor": 0.5}, "capacity_factor = 0.5"),
        ({"kind": "timestep", "capacity_factor": 1.0}, "router.kind = timestep"),
        ({"kind": "modality", "choice": "expert"}, "router.kind = modality"),
        ({"kind": "timestep", "draw": True, "balance": "bias"}, "balance = loss, prior or none"),
        ({"choice": "expert", "balance": "none"}, "router.renormalise = false"),
    ],
)
def test_routers_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("audio", ExpertsConfig(), "no such stream"),
        ("video", ExpertsConfig(blocks=(5,)), r"are in blocks \[0, 1\]"),
        ("video", ExpertsConfig(top_k=1, router=RouterConfig("modality")), "experts.all"),
    ],
)
def test_experts_that_have_no_place(name: str, experts: ExpertsConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model_config(experts={name: experts})


def test_experts_without_bias_or_gate() -> None:
    experts = Experts(3, WIDTH, 8, "gelu_tanh", bias=False)
    assert [name for name, _ in experts.named_parameters()] == ["up", "down"]
