"""Experts in any layout: the same loss, gradients, parameters, corrections and choices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from torch import Tensor

from kinodit.models.config import MMDiTConfig
from kinodit.models.moe import router
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.trainer.certify.layouts import default_layouts
from kinodit.trainer.certify.trace import Array, Trace, trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.config import NativeConfig
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.quick import quick
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
# Samples of 2 to 17 tokens: of each, a capacity of its mean load drops some, and experts choose.
AMONG_SAMPLES = tiny_model_config(
    num_heads=4,
    width=32,
    experts={
        "video": ExpertsConfig(
            4, 2, 1.0, 0.5, router=replace(SKEWED, capacity_factor=1.0), blocks=(0,)
        ),
        "text": ExpertsConfig(
            4, 1, 1.0, router=RouterConfig(choice="expert", balance="none", renormalise=False)
        ),
        "all": ExpertsConfig(
            8, 2, 0.5, router=RouterConfig(choice="expert", balance="none", renormalise=False)
        ),
    },
)
BY_PLACE = {
    "video": ExpertsConfig(4, 1, 1.0, router=RouterConfig("noise_level")),
    "text": ExpertsConfig(4, 2, 1.0, router=RouterConfig("timestep", loss_weight=0.1)),
    "all": ExpertsConfig(2, 1, 1.0, router=RouterConfig("modality")),
}


# A router of two layers that draws, and the prior that routers of both blocks are matched with.
BY_NOISE = tiny_model_config(
    num_heads=4,
    width=32,
    num_double_blocks=3,
    experts={
        "video": ExpertsConfig(
            4,
            2,
            1.0,
            router=RouterConfig(
                "timestep", hidden_ratio=2.0, draw=True, balance="prior", loss_weight=1.0
            ),
        ),
        "text": ExpertsConfig(
            4, 1, 1.0, router=RouterConfig("timestep", balance="prior", renormalise=False)
        ),
    },
)


def twin_of(model: MMDiTConfig, remat: str = "none") -> Twin:
    remat_config = RematConfig(remat)  # type: ignore[arg-type]
    optim = OptimConfig(lr=3e-3)
    return Twin(RunConfig(model=model, optim=optim, remat=remat_config), ())


@dataclass
class Routed:
    """A trace, and what each row of scores was answered with, by function of the router."""

    trace: Trace
    scores: dict[str, list[Array]] = field(default_factory=dict)
    chosen: dict[str, list[Array]] = field(default_factory=dict)


def routed(rank: int, world_size: int, made: Twin, parallel: ParallelConfig) -> Routed:
    found = Routed(Trace())

    def recording(name: str) -> Any:
        decide = getattr(router, name)

        def recorded(scores: Tensor, *others: Any) -> Tensor:
            answer: Tensor = decide(scores, *others)
            found.scores.setdefault(name, []).append(scores.numpy().copy())
            found.chosen.setdefault(name, []).append(answer.numpy().copy())
            return answer

        return patch.object(router, name, recorded)

    with recording("best"), recording("best_of_sample"):
        found.trace = trace(rank, world_size, made, parallel)
    return found


def answers(routed: Routed) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Scores, rounded far above the last bits -> the experts that were chosen."""
    return {
        (name, *np.round(row, 7)): tuple(index)
        for name, calls in routed.scores.items()
        for scores, chosen in zip(calls, routed.chosen[name], strict=True)
        for row, index in zip(scores, chosen, strict=True)
    }


@pytest.fixture(scope="module")
def reference() -> Routed:
    return routed(0, 1, twin_of(MODEL), ParallelConfig(dp_shard=1))


@pytest.fixture(scope="module")
def selective() -> Routed:
    return routed(0, 1, twin_of(AMONG_SAMPLES), ParallelConfig(dp_shard=1))


def check(found: Trace, expected: Trace) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)
    assert found.norms == pytest.approx(expected.norms, rel=1e-12)
    for step, loads in zip(found.loads, expected.loads, strict=True):
        assert step.keys() == loads.keys() and loads
        for key, sums in loads.items():
            np.testing.assert_allclose(step[key], sums, rtol=1e-9, atol=1e-12)
    for name in ("gradients", "parameters", "averages"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        scale = max(float(np.abs(value).max()) for value in theirs.values())
        for key, value in theirs.items():
            assert float(np.abs(ours[key] - value).max()) <= 1e-12 * scale, (name, key)


def test_some_experts_get_no_token(reference: Routed) -> None:
    calls = zip(reference.scores["best"], reference.chosen["best"], strict=True)
    skewed = [chosen for scores, chosen in calls if np.ptp(scores) > 10]
    assert len(skewed) > 1
    assert all(len(np.unique(chosen)) < 4 for chosen in skewed)


def test_every_weight_of_experts_and_routers_learns(reference: Routed) -> None:
    gradients = reference.trace.gradients
    ours = [name for name in gradients if ".mlp.router." in name or ".mlp.experts." in name]
    assert len(ours) > 10
    assert [name for name in ours if float(np.abs(gradients[name]).max()) == 0] == []


@pytest.mark.parametrize("remat", quick(["full", "selective", "offload"], "selective", "offload"))
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


def check_layout(
    parallel: ParallelConfig, groups: dict[int, Ranks], model: MMDiTConfig, expected: Routed
) -> None:
    """Every rank trains as one process does, and routes its tokens as that does."""
    known = answers(expected)
    for found in groups[size_of(parallel)].run(routed, twin_of(model), parallel):
        check(found.trace, expected.trace)
        ours = answers(found)
        assert ours and {row: known[row] for row in ours} == ours


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(LAYOUTS, "fsdp2", "ep2 x tp2"))
def test_layout(name: str, groups: dict[int, Ranks], reference: Routed) -> None:
    check_layout(LAYOUTS[name], groups, MODEL, reference)


def test_some_tokens_have_no_expert_and_others_many(selective: Routed) -> None:
    kept = [np.unique(rows.sum(1)) for rows in selective.chosen["best_of_sample"]]
    assert any(0 in numbers for numbers in kept)
    assert any(max(numbers, default=0) > 2 for numbers in kept)
    gradients = selective.trace.gradients
    routers = [name for name in gradients if ".mlp.router." in name]
    assert len(routers) == 4
    assert [name for name in routers if float(np.abs(gradients[name]).max()) == 0] == []


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(LAYOUTS, "tp2"))
def test_choices_among_the_tokens_of_a_sample(
    name: str, groups: dict[int, Ranks], selective: Routed
) -> None:
    check_layout(LAYOUTS[name], groups, AMONG_SAMPLES, selective)


def test_choices_among_the_tokens_of_a_sample_do_not_depend_on_packs(selective: Routed) -> None:
    merged = NativeConfig(micro_batches=1)
    parallel = ParallelConfig(dp_shard=1)
    check(trace(0, 1, twin_of(AMONG_SAMPLES), parallel, engine_config=merged), selective.trace)


@pytest.mark.parametrize("remat", quick(["full", "selective"], "full"))
def test_choices_among_the_tokens_of_a_sample_are_made_again(remat: str, selective: Routed) -> None:
    check(trace(0, 1, twin_of(AMONG_SAMPLES, remat), ParallelConfig(dp_shard=1)), selective.trace)


@pytest.fixture(scope="module")
def by_noise() -> Routed:
    return routed(0, 1, twin_of(BY_NOISE), ParallelConfig(dp_shard=1))


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_draws_of_experts_and_matches_with_a_prior(
    name: str, groups: dict[int, Ranks], by_noise: Routed
) -> None:
    check_layout(LAYOUTS[name], groups, BY_NOISE, by_noise)


def test_draws_and_matches_do_not_depend_on_packs_or_recomputation(by_noise: Routed) -> None:
    parallel, merged = ParallelConfig(dp_shard=1), NativeConfig(micro_batches=1)
    check(trace(0, 1, twin_of(BY_NOISE), parallel, engine_config=merged), by_noise.trace)
    check(trace(0, 1, twin_of(BY_NOISE, "full"), parallel), by_noise.trace)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "selective", "offload"])
def test_remat_with_experts_on_several_ranks(
    remat: str, groups: dict[int, Ranks], reference: Routed
) -> None:
    """What gathers experts runs inside of what is computed again."""
    for name in ("ep2", "ep2 of fsdp4"):
        parallel = LAYOUTS[name]
        for found in groups[size_of(parallel)].run(trace, twin_of(MODEL, remat), parallel):
            check(found, reference.trace)


@pytest.mark.slow
@pytest.mark.gloo
def test_experts_by_place(groups: dict[int, Ranks]) -> None:
    by_place = twin_of(tiny_model_config(num_heads=4, width=32, experts=BY_PLACE))
    expected = trace(0, 1, by_place, ParallelConfig(dp_shard=1))
    for found in groups[2].run(trace, by_place, ParallelConfig(dp_shard=1, tp=2)):
        check(found, expected)


def test_certificates_keep_routers_and_drop_tokens_where_the_recipe_might() -> None:
    router = RouterConfig(capacity_factor=2.0, scores="sigmoid")
    model = replace(MODEL, experts={"video": ExpertsConfig(64, 8, 0.5, router=router)})
    small = twin(replace(RunConfig(), model=model)).config.model.experts["video"]
    assert small.router == replace(router, capacity_factor=1.0)
    assert (small.num_experts, small.top_k) == (4, 2)


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
