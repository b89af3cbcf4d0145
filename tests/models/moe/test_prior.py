"""The diffusion prior: its units, its divergence, its matching; and experts that are drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kinodit.models.errors import ConfigError
from kinodit.models.flops import count_parameters
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.moe.layer import moe_layers
from kinodit.models.moe.prior import (
    NUM_TASKS,
    divergence,
    first_unit,
    matched_units,
    prior_shares,
    task_levels,
)
from kinodit.models.moe.router import Router, Seen, best, gumbel
from kinodit.models.random import hashed_uniform
from tests.models.packs import randomize
from tests.support.synthetic import tiny_model_config

UNITS = torch.arange(12)
WIDTH = 4


def test_the_prior_gives_each_level_neighbouring_units_that_move_with_the_noise() -> None:
    level_t = torch.tensor([0.0, 0.5, 0.9, 1.0])
    assert first_unit(level_t, 12, WIDTH).tolist() == [0, round(0.5), round(8 * 0.9**4), 8]
    shares = prior_shares(level_t, UNITS, 12, WIDTH)
    assert (shares > 0).nonzero()[:, 1].tolist() == [
        *range(4),
        *range(4),
        *range(5, 9),
        *range(8, 12),
    ]
    assert shares.sum(1).tolist() == [1, 1, 1, 1]


def test_layers_add_up_to_the_divergence_of_all_their_experts() -> None:
    torch.manual_seed(0)
    ours = torch.randn(5, 3, 4).double().softmax(-1) / 3
    prior = prior_shares(torch.rand(5), UNITS, 12, WIDTH).view(5, 3, 4)
    parts = sum(divergence(ours[:, layer], prior[:, layer]) for layer in range(3))
    p, q = ours.flatten(1), prior.flatten(1)
    mean = (p + q) / 2
    kl = torch.xlogy(p, p / mean) + torch.where(q > 0, torch.xlogy(q, q / mean), 0)
    torch.testing.assert_close(parts, kl.sum() / 2, rtol=1e-12, atol=0)
    assert 0 < float(parts) < 5 * math.log(2)


def test_a_router_that_has_the_prior_has_no_divergence_and_no_gradient() -> None:
    prior = prior_shares(torch.tensor([0.3]), UNITS, 12, 12)
    shares = torch.full((1, 12), 1 / 12, dtype=torch.float64, requires_grad=True)
    loss = divergence(shares, prior)
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert shares.grad is not None and float(shares.grad.abs().max()) < 1e-15


def test_shares_that_vanish_have_a_finite_gradient() -> None:
    shares = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    divergence(shares, torch.tensor([[0.0, 0.0, 1.0]])).backward()
    assert shares.grad is not None and bool(shares.grad.isfinite().all())


def test_experts_are_matched_with_the_units_that_they_serve() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    levels = task_levels(torch.device("cpu"))
    masks = (prior_shares(levels, order, 12, WIDTH) > 0).t().to(torch.uint8).numpy()
    matched = torch.from_numpy(matched_units(masks, WIDTH))
    again = prior_shares(levels, matched, 12, WIDTH)
    assert torch.equal(again, prior_shares(levels, order, 12, WIDTH))


def test_units_are_those_that_differ_least_over_all_matchings() -> None:
    masks = np.random.default_rng(0).integers(0, 2, (6, NUM_TASKS)).astype(np.uint8)
    levels = task_levels(torch.device("cpu"))
    prior = (prior_shares(levels, torch.arange(6), 6, 2) > 0).t().numpy()

    def differences(units: Sequence[int]) -> int:
        return int((prior[list(units)] != masks).sum())

    found = matched_units(masks, 2).tolist()
    assert differences(found) == min(map(differences, itertools.permutations(range(6))))


def test_experts_are_drawn_by_their_scores_without_putting_back() -> None:
    scores = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    num = 40_000
    drawn = best(scores.log() + gumbel(torch.arange(num), 7, 3), 2)
    for pair in itertools.permutations(range(3), 2):
        first, second = (float(scores[e]) for e in pair)
        expected = first * second / (1 - first)
        found = float((drawn == torch.tensor(pair)).all(1).double().mean())
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / num), pair


def test_hashed_numbers_depend_on_every_key_and_fill_the_interval() -> None:
    keys = torch.tensor([0, 1, -1, 2**62])
    one = hashed_uniform(keys, 5, 1000)
    assert torch.equal(one[:2], hashed_uniform(keys[:2], 5, 1000))
    assert (
        len({*one.flatten().tolist(), *hashed_uniform(keys, 2**40, 1000).flatten().tolist()})
        == 8000
    )
    assert 0 < float(one.min()) < 0.002 and 0.998 < float(one.max()) < 1
    assert abs(float(one.mean()) - 0.5) < 0.02


MODE = ExpertsConfig(3, 2, 1.0, router=RouterConfig("timestep", hidden_ratio=2.0, draw=True))


def test_a_router_of_two_layers_draws_in_training_and_takes_the_best_otherwise() -> None:
    router = Router(16, MODE, 8).double()
    randomize(router)
    time = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
    x, row = torch.zeros(40, 16).double(), torch.arange(20).repeat(2)
    seen = Seen(torch.zeros(40), level=row, time=time, segment=row, num_segments=20)
    assert router.hidden is not None and router.hidden_bias is not None
    assert router.weight is not None
    logits = F.gelu(time @ router.hidden.t() + router.hidden_bias) @ router.weight.t()
    choice = router(x, seen)
    scores = logits.softmax(-1)
    assert torch.equal(choice.index, best(scores, 2)[row])
    draws = torch.arange(20) * 2**50
    router.key = 3
    drawn = router(x, replace(seen, draws=draws))
    assert torch.equal(drawn.index, best(scores.log() + gumbel(draws, 3, 3), 2)[row])
    assert not torch.equal(drawn.index, choice.index)
    assert drawn.gates.sum(1).tolist() == pytest.approx([1.0] * 40)


def test_parameters_of_routers_of_two_layers_are_counted() -> None:
    config = tiny_model_config(experts={"video": MODE})
    model = MMDiT(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    layers = moe_layers(model).values()
    assert len({layer.router.key for layer in layers}) == len(layers) > 1


@pytest.mark.parametrize("fields", [{"draw": True}, {"balance": "prior"}])
def test_what_only_routers_by_timestep_can_do(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"set router\.kind = timestep"):
        RouterConfig(**fields)  # type: ignore[arg-type]
