"""A model built without memory starts from the weights of one that had it, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.certify.trace import Array, whole
from kinodit.trainer.parallel.deferred import initial_values, materialize
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.laid_out import PARALLELS, SEED, laid_out
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

CPU = torch.device("cpu")
EXPERTS = {"video": ExpertsConfig(4, 2, 1.0, 0.5)}
CONFIG = tiny_model_config(num_heads=4, modulation_rank=4, activation="swiglu", experts=EXPERTS)


def weights(rank: int, world_size: int, parallel: ParallelConfig) -> dict[str, Array]:
    model = laid_out(rank, world_size, parallel, CONFIG)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def expected() -> dict[str, Array]:
    model = MMDiT(CONFIG)
    initialize(model, SEED)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def test_one_process_starts_from_them() -> None:
    found, known = weights(0, 1, ParallelConfig()), expected()
    assert all(np.array_equal(found[name], known[name]) for name in known)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "parallel",
    quick(PARALLELS, ParallelConfig(), ParallelConfig(tp=4), ParallelConfig(tp=2, dp_replicate=2)),
    ids=str,
)
def test_every_layout_starts_from_them(parallel: ParallelConfig, four: Ranks) -> None:
    known = expected()
    for found in four.run(weights, parallel):
        assert found.keys() == known.keys()
        assert [name for name in known if not np.array_equal(found[name], known[name])] == []


def test_what_has_no_rule_is_refused() -> None:
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    with pytest.raises(LookupError, match="no rule initialises"):
        materialize(module, initial_values(0), CPU)
