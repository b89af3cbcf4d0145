from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.trainer.optim import OptimConfig, ParameterRule, ScheduleConfig, build_optimizer


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def updates(config: OptimConfig, lr: float, num_steps: int = 1) -> dict[str, torch.Tensor]:
    """How far each parameter moves when every gradient is zero: weight decay alone."""
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_optimizer(config, net)
    for _ in range(num_steps):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.set_lr(lr)
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def test_matrices_decay_and_vectors_do_not() -> None:
    moved = updates(OptimConfig(weight_decay=0.5), lr=0.1)
    assert {name for name, change in moved.items() if change.abs().max() > 0} == {
        "0.weight",
        "2.weight",
    }


def test_first_rule_that_matches_decides_rate_and_decay() -> None:
    rules = {
        "head": ParameterRule(r"^2\.weight", lr_scale=0.5, weight_decay=0.2),
        "rest": ParameterRule(r"weight", lr_scale=2.0, weight_decay=0.2),
    }
    net = model()
    moved = updates(OptimConfig(rules=rules), lr=0.1)
    weights = dict(net.named_parameters())
    assert torch.allclose(moved["2.weight"], -0.1 * 0.5 * 0.2 * weights["2.weight"])
    assert torch.allclose(moved["0.weight"], -0.1 * 2.0 * 0.2 * weights["0.weight"])


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="encoder"):
        build_optimizer(OptimConfig(rules={"x": ParameterRule("encoder")}), model())


def test_state_is_named_by_parameter_and_loads_in_place() -> None:
    net = model()
    optimizer = build_optimizer(OptimConfig(), net)
    state = optimizer.state()
    assert set(state) == {
        f"{moment}/{name}"
        for moment in ("exp_avg", "exp_avg_sq")
        for name, _ in net.named_parameters()
    }
    state["exp_avg/0.weight"].fill_(1.0)
    optimizer.set_num_steps(100)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = net[0].weight.detach().clone()  # type: ignore[index]
    optimizer.set_lr(0.1)
    optimizer.step()
    assert not torch.equal(net[0].weight, before)  # type: ignore[index]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig("constant"), {0: 1.0, 50: 1.0, 99: 1.0}),
        (ScheduleConfig("constant", warmup_steps=9), {0: 0.1, 8: 0.9, 9: 1.0}),
        (ScheduleConfig("linear", final_factor=0.1), {0: 1.0, 99: 0.1}),
        (ScheduleConfig("cosine"), {0: 1.0, 99: 0.0}),
        (ScheduleConfig("wsd", decay_steps=10), {0: 1.0, 89: 1.0, 90: 1.0, 99: 0.0}),
    ],
)
def test_schedule(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    found = {step: schedule.factor(step, 100) for step in expected}
    assert found == pytest.approx(expected)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert ScheduleConfig("cosine").factor(50, 101) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "fields", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"max_grad_norm": -1.0}, {"lr": -math.inf}]
)
def test_bad_values_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**fields)  # type: ignore[arg-type]
