"""Experts in any layout: the same loss, gradients, parameters, corrections and choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from kinodit.models.config import MMDiTConfig
from kinodit.models.moe import router
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.trainer.certify.engines import ENGINES, can_have
from kinodit.trainer.certify.layouts import default_layouts
from kinodit.trainer.certify.trace import Array, Trace, trace
from kinodit.trainer.certify.twin import Twin
from kinodit.trainer.config import RunConfig
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

# A step moves corrections so far that they alone decide: in the second step, experts that had more
# than the mean in the first get no token.
SKEWED = RouterConfig(scores="sigmoid", balance="bias", bias_rate=10.0, z_weight=0.01)
BY_LOSS = RouterConfig(loss_weight=0.1, z_weight=0.01, renormalise=False)
EXPERTS = {
    "video": ExpertsConfig(4, 2, 1.0, 0.5, router=SKEWED),
    "text": ExpertsConfig(4, 1, 1.0, blocks=(0,), router=BY_LOSS),
    "all": ExpertsConfig(4, 2, 0.5, router=BY_LOSS),
}
MODEL = tiny_model_config(num_heads=4, width=32, experts=EXPERTS)
BY_PLACE = {
    "video": ExpertsConfig(4, 1, 1.0, router=RouterConfig("noise_level")),
    "text": ExpertsConfig(4, 2, 1.0, router=RouterConfig("timestep", loss_weight=0.1)),
    "all": ExpertsConfig(2, 1, 1.0, router=RouterConfig("modality")),
}


def twin_of(model: MMDiTConfig, remat: str = "none") -> Twin:
    remat_config = RematConfig(remat)  # type: ignore[arg-type]
    optim = OptimConfig(lr=3e-3)
    return Twin(RunConfig(model=model, optim=optim, remat=remat_config), ())


@dataclass
class Routed:
    """A trace, and what each row of scores was answered with."""

    trace: Trace
    scores: list[Array] = field(default_factory=list)
    chosen: list[Array] = field(default_factory=list)


def routed(rank: int, world_size: int, twin: Twin, parallel: ParallelConfig) -> Routed:
    found = Routed(Trace())
    best = router.best

    def recording(scores: Tensor, k: int) -> Tensor:
        index = best(scores, k)
        found.scores.append(scores.numpy().copy())
        found.chosen.append(index.numpy().copy())
        return index

    router.best = recording
    try:
        found.trace = trace(rank, world_size, twin, parallel)
    finally:
        router.best = best
    return found


def answers(routed: Routed) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Scores, rounded far above the last bits -> the experts that were chosen."""
    return {
        tuple(np.round(row, 7)): tuple(index)
        for scores, chosen in zip(routed.scores, routed.chosen, strict=True)
        for row, index in zip(scores, chosen, strict=True)
    }


@pytest.fixture(scope="module")
def reference() -> Routed:
    return routed(0, 1, twin_of(MODEL), ParallelConfig(dp_shard=1))


def check(found: Trace, expected: Trace) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)
    assert found.norms == pytest.approx(expected.norms, rel=1e-12)
    for name in ("gradients", "parameters", "averages"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        scale = max(float(np.abs(value).max()) for value in theirs.values())
        for key, value in theirs.items():
            assert float(np.abs(ours[key] - value).max()) <= 1e-12 * scale, (name, key)


def test_some_experts_get_no_token(reference: Routed) -> None:
    calls = zip(reference.scores, reference.chosen, strict=True)
    skewed = [chosen for scores, chosen in calls if np.ptp(scores) > 10]
    assert len(skewed) > 1
    assert all(len(np.unique(chosen)) < 4 for chosen in skewed)


def test_every_weight_of_experts_and_routers_learns(reference: Routed) -> None:
    gradients = reference.trace.gradients
    ours = [name for name in gradients if ".mlp.router." in name or ".mlp.experts." in name]
    assert len(ours) > 10
    assert [name for name in ours if float(np.abs(gradients[name]).max()) == 0] == []


@pytest.mark.parametrize("remat", ["full", "selective", "offload"])
def test_remat(remat: str, reference: Routed) -> None:
    check(trace(0, 1, twin_of(MODEL, remat), ParallelConfig(dp_shard=1)), reference.trace)


LAYOUTS = {
    "fsdp2": ParallelConfig(dp_shard=2),
    "tp2": ParallelConfig(dp_shard=1, tp=2),
    "ulysses2": ParallelConfig(dp_shard=1, cp=2),
    "hsdp2x2": ParallelConfig(dp_replicate=2, dp_shard=2),
    "ring2 x tp2": ParallelConfig(dp_shard=1, cp=2, ring=2, tp=2),
    "ep2": ParallelConfig(dp_shard=2, ep=2),
    "ep4": ParallelConfig(dp_shard=4, ep=4),
    "ep2 of fsdp4": ParallelConfig(dp_shard=4, ep=2),
    "ddp2 x ep2": ParallelConfig(dp_replicate=2, dp_shard=2, ep=2),
    "ep2 of ulysses2": ParallelConfig(dp_shard=1, cp=2, ep=2),
    "ep4 of fsdp2 x ring2": ParallelConfig(dp_shard=2, cp=2, ring=2, ep=4),
    "ep2 x tp2": ParallelConfig(dp_shard=2, tp=2, ep=2),
}


def size_of(parallel: ParallelConfig) -> int:
    return parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp


@pytest.mark.gloo
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, groups: dict[int, Ranks], reference: Routed) -> None:
    parallel = LAYOUTS[name]
    known = answers(reference)
    for found in groups[size_of(parallel)].run(routed, twin_of(MODEL), parallel):
        check(found.trace, reference.trace)
        ours = answers(found)
        assert ours and {row: known[row] for row in ours} == ours


@pytest.mark.gloo
def test_experts_by_place(groups: dict[int, Ranks]) -> None:
    twin = twin_of(tiny_model_config(num_heads=4, width=32, experts=BY_PLACE))
    expected = trace(0, 1, twin, ParallelConfig(dp_shard=1))
    for found in groups[2].run(trace, twin, ParallelConfig(dp_shard=1, tp=2)):
        check(found, expected)


def test_certificates_deal_experts_out_where_there_are_any() -> None:
    base = ParallelConfig()
    with_experts = default_layouts(MODEL, base, 4)
    assert {(one.ep, one.dp_shard, one.cp, one.tp) for one in with_experts if one.ep > 1} == {
        (2, 2, 1, 1),
        (4, 4, 1, 1),
        (2, 4, 1, 1),
        (2, 1, 2, 1),
        (4, 2, 2, 1),
        (2, 1, 2, 2),
        (2, 2, 1, 2),
    }
    dense = default_layouts(tiny_model_config(num_heads=4), base, 4)
    assert all(one.ep == 1 for one in dense)
    config = twin_of(MODEL).config
    layout = ParallelConfig(dp_shard=2)
    takers = [name for name, engine in ENGINES.items() if can_have(engine, layout, config)]
    assert takers == ["native"]
