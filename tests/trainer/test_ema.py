from __future__ import annotations

import pytest
import torch
from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import Mesh


def engine_of(model: nn.Module) -> NativeEngine:
    optimizer = build_optimizer(OptimConfig(), model)
    return NativeEngine(model, optimizer, Mesh(torch.device("cpu")), PrecisionConfig())


def test_average_follows_the_recurrence_with_warm_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(EmaConfig(0.5), engine_of(model))
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, -1.0]):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(ema.average["weight"]) == pytest.approx(expected)


def test_swapped_in_only_inside_the_context_even_after_an_error() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(EmaConfig(0.9), engine_of(model))
    with torch.no_grad():
        model.weight.add_(1.0)
    trained, averaged = model.weight.detach().clone(), ema.average["weight"].clone()
    with pytest.raises(KeyError), ema.swapped_in():
        assert torch.equal(model.weight, averaged)
        raise KeyError
    assert torch.equal(model.weight, trained)
    assert torch.equal(ema.average["weight"], averaged)


def test_decay_of_one_is_refused() -> None:
    with pytest.raises(ConfigError):
        EmaConfig(1.0)
