"""Experts by megatron-core's dispatchers: its own code on gloo, a stand-in for DeepEP's kernels."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.moe.experts import Experts
from kinodit.trainer.certify.layouts import with_degrees
from kinodit.trainer.certify.trace import trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import compare_traces
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.core import token_dispatcher
from kinodit.trainer.engine.megatron.dispatch import TokenDispatch
from kinodit.trainer.engine.megatron.elsewhere import without_streams
from kinodit.trainer.engine.refusals import Wish, refusal
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.collectives import all_to_all
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config
from tests.support.wishes import cuda_wish

CPU = torch.device("cpu")
WIDTH, HIDDEN = 8, 16
COUNTS_OF_RANKS = ([5, 0, 2, 1], [0, 0, 0, 9])
"""Rows for each of four experts, of which each rank has two."""
ALLTOALL, FLEX = MegatronConfig(dispatcher="alltoall"), MegatronConfig(dispatcher="flex")
DEALT = ParallelConfig(ep=2)


def experts_of(first: int, stop: int) -> Experts:
    source = torch.Generator().manual_seed(0)
    whole = Experts(4, WIDTH, HIDDEN, "swiglu", bias=True).double()
    own = Experts(stop - first, WIDTH, HIDDEN, "swiglu", bias=True).double()
    for part, parameter in zip(own.parameters(), whole.parameters(), strict=True):
        drawn = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        part.data = drawn[first:stop].clone()
    return own


def rows_of(rank: int) -> Tensor:
    source = torch.Generator().manual_seed(rank + 1)
    count = sum(COUNTS_OF_RANKS[rank])
    return torch.randn(count, WIDTH, generator=source, dtype=torch.float64).requires_grad_()


class Kernels:
    """Dispatch and combine of DeepEP by their documented interface, over gloo, a row at a time."""

    def dispatch(
        self,
        x: Tensor,
        indices: Tensor,
        probs: Tensor,
        num_experts: int,
        group: ProcessGroup,
        **asynchronous: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """(rows, their experts here, their probabilities, [experts here] counts, a handle)."""
        assert probs.dtype == torch.float32 and bool((probs == 1).all())
        degree = dist.get_world_size(group)
        own = num_experts // degree
        to = indices.flatten() // own
        assert bool((to.diff() >= 0).all()), "rows lie in the order of experts"
        sent = torch.bincount(to, minlength=degree)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=group)
        sizes = sent.tolist(), came.tolist()
        rows = all_to_all(x, *sizes, group, "test")
        experts, ones = (
            all_to_all(part.flatten(), *sizes, group, "test") for part in (indices % own, probs)
        )
        counts = torch.bincount(experts, minlength=own)
        return rows, experts.unsqueeze(1), ones.unsqueeze(1), counts, sizes

    def combine(
        self, x: Tensor, group: ProcessGroup, handle: Any, **asynchronous: bool
    ) -> tuple[Tensor, None]:
        """(every row's result at home, nothing)."""
        sent, came = handle
        return all_to_all(x, came, sent, group, "test"), None


def dispatched(rank: int, world_size: int, kind: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What each rank gets for its rows, their gradient, and those of its experts."""
    assert dist.group.WORLD is not None
    experts, x = experts_of(2 * rank, 2 * rank + 2), rows_of(rank)
    kernels = Kernels()
    patched = mock.patch.multiple(
        token_dispatcher,
        fused_dispatch=kernels.dispatch,
        fused_combine=kernels.combine,
        set_deepep_num_sms=lambda number: None,
    )
    # It has one of its methods compiled.
    eager = torch.compiler.set_stance("force_eager")
    with patched, eager, without_streams(CPU):
        apply = TokenDispatch(kind, dist.group.WORLD)
        for _ in range(2):
            x.grad = None
            experts.zero_grad()
            counts = torch.tensor(COUNTS_OF_RANKS[rank])
            out, beside = apply(experts, x, counts, lambda: torch.ones(1))
            out.backward(torch.ones_like(out))
        assert beside is not None and len(apply.dispatchers) == 1
    assert x.grad is not None
    return out.detach(), x.grad, [p.grad for p in experts.parameters() if p.grad is not None]


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["alltoall", "flex"])
def test_rows_come_to_their_experts_and_back(kind: str, two: Ranks) -> None:
    whole = experts_of(0, 4)
    found = two.run(dispatched, kind)
    for rank, (out, grad, _) in enumerate(found):
        x = rows_of(rank)
        expected = whole(x, torch.tensor(COUNTS_OF_RANKS[rank]))
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, x.grad, rtol=1e-12, atol=1e-12)
    for index, parameter in enumerate(whole.parameters()):
        gathered = torch.cat([gradients[index] for _, _, gradients in found])
        torch.testing.assert_close(gathered, parameter.grad, rtol=1e-12, atol=1e-12)


def with_experts() -> Twin:
    pools = {"video": ExpertsConfig(num_experts=4, top_k=2, shared_ratio=1.0)}
    return twin(RunConfig(model=tiny_model_config(num_heads=4, experts=pools)))


@pytest.mark.gloo
def test_it_trains_as_one_process_does(two: Ranks) -> None:
    small, parallel = with_experts(), with_degrees(ParallelConfig(), {"dp_shard": 2, "ep": 2})
    found = two.run(trace, small, parallel, "float64", 0, False, "cpu", ALLTOALL)
    verdict = compare_traces(trace(0, 1, small, ParallelConfig()), found)
    assert verdict.ok, verdict.faults


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_shard": 4, "ep": 4},
        {"dp_shard": 2, "tp": 2, "ep": 2},
        {"cp": 2, "tp": 2, "ep": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "cp": 2, "ring": 2, "ep": 4},
    ],
    ids=json.dumps,
)
def test_layouts_train_as_one_process_does(
    degrees: dict[str, int], sequence_parallel: bool, four: Ranks
) -> None:
    small, parallel = with_experts(), with_degrees(ParallelConfig(), degrees)
    config = replace(ALLTOALL, sequence_parallel=sequence_parallel)
    found = four.run(trace, small, parallel, "float64", 0, False, "cpu", config)
    verdict = compare_traces(trace(0, 1, small, ParallelConfig()), found)
    assert verdict.ok, verdict.faults


WISH = replace(cuda_wish(FLEX), parallel=DEALT)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(WISH, parallel=ParallelConfig()), "set parallel.ep"),
        (replace(WISH, engine=ALLTOALL, parallel=ParallelConfig()), "nothing is dispatched"),
        (replace(WISH, device="cpu"), "needs a CUDA device, found cpu: set engine.dispatcher=own"),
        (replace(WISH, precision=PrecisionConfig()), "kernels for precision.compute=bfloat16"),
    ],
)
def test_refused_with_the_reason(wish: Wish, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert reason in refusal(wish)
    assert refusal(WISH) == refusal(replace(WISH, engine=ALLTOALL, device="cpu")) == ""


def test_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs DeepEP, which is not installed" in refusal(WISH)
    assert refusal(replace(WISH, engine=ALLTOALL)) == refusal(replace(WISH, elsewhere=True)) == ""
