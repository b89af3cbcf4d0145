"""The plan is a pure function of spec and step, whatever reads it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.chosen import Chosen
from kinodit.data.plan import GlobalBatch, assign, plan
from kinodit.data.shapes import Grid
from kinodit.data.spec import CostModel, DatasetSpec, PlanError, PlanSpec


def dataset(name: str = "clips", count: int = 37, **changes: Any) -> DatasetSpec:
    fields: dict[str, Any] = {"content_hash": "abc", "tokens": 10, **changes}
    return DatasetSpec(name, num_samples=count, **fields)


def spec(*datasets: DatasetSpec, samples: int = 8, packs: int = 3, **changes: Any) -> PlanSpec:
    chosen = datasets or (dataset(),)
    fields: dict[str, Any] = {"seed": 5, **changes}
    return PlanSpec(chosen, samples_per_step=samples, packs_per_step=packs, **fields)


def indices(batch: GlobalBatch) -> list[int]:
    refs = sorted((ref for pack in batch.packs for ref in pack), key=lambda ref: ref.slot)
    return [ref.index for ref in refs]


def test_a_plan_is_the_same_whenever_and_in_whatever_order_it_is_made() -> None:
    forwards = [plan(spec(), step) for step in range(20)]
    backwards = [plan(spec(), step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({batch.packs for batch in forwards}) == 20


@pytest.mark.parametrize("samples", [7, 400, 1500])
def test_a_plan_does_not_depend_on_what_is_drawn_with_it(samples: int) -> None:
    shapes = ((1, 8, 8), (5, 16, 8))
    sized = {"shapes": shapes, "shape_of": np.arange(31) % 2}
    mixed = spec(
        dataset("a", 31, weight=0.6, tokens=np.arange(1, 32), **sized), dataset("b", 500),
        samples=samples, packs=2,
    )  # fmt: skip
    steps = [0, 1, 2, 145, 146, 147, 10**17]
    together = [plan(mixed, step) for step in steps]
    with patch("kinodit.data.plan.DRAWN_AT_ONCE", 1):
        assert [plan(mixed, step) for step in steps] == together


def test_every_sample_comes_once_in_every_epoch() -> None:
    one = spec(samples=8)
    stream = [index for step in range(37) for index in indices(plan(one, step))]
    epochs = [stream[start : start + 37] for start in range(0, len(stream), 37)]
    assert len(epochs) == 8
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_epochs_are_named_and_counted() -> None:
    one = spec(samples=8)
    seen = [ref for step in range(37) for pack in plan(one, step).packs for ref in pack]
    assert Counter(ref.epoch for ref in seen) == dict.fromkeys(range(8), 37)
    assert one.epochs(37) == {"clips": 8.0}
    assert one.epochs(1) == {"clips": 8 / 37}
    assert seen[0].sample_id == f"clips:{seen[0].index}"
    assert seen[0].key(4).step == 4


def test_a_step_larger_than_the_dataset_repeats_it() -> None:
    small = spec(dataset(count=3), samples=7, packs=1)
    stream = [index for step in range(6) for index in indices(plan(small, step))]
    assert all(sorted(stream[s : s + 3]) == [0, 1, 2] for s in range(0, 42, 3))


def test_only_eligible_samples_take_part() -> None:
    chosen = np.array([3, 5, 8, 13, 21], dtype=np.int64)
    filtered = spec(dataset(eligible=Chosen.of(chosen)), samples=5, packs=2)
    for step in range(4):
        assert sorted(indices(plan(filtered, step))) == chosen.tolist()


def test_mixture_shares_hold_in_every_prefix_of_the_run() -> None:
    mixed = spec(
        dataset("a", 11, weight=0.5), dataset("b", 50, weight=0.3), dataset("c", 7, weight=0.2)
    )
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    counts: Counter[str] = Counter()
    seen = 0
    for step in range(150):
        refs = sorted((r for pack in plan(mixed, step).packs for r in pack), key=lambda r: r.slot)
        for ref in refs:
            counts[ref.dataset] += 1
            seen += 1
            assert all(abs(counts[name] - seen * weights[name]) < 1 for name in weights)
    assert mixed.epochs(150) == {"a": 600 / 11, "b": 360 / 50, "c": 240 / 7}


def test_each_dataset_of_a_mixture_has_exact_epochs() -> None:
    mixed = spec(dataset("a", 11, weight=2), dataset("b", 5, weight=1), samples=6)
    for name, count in (("a", 11), ("b", 5)):
        stream = [
            ref.index
            for step in range(22)
            for ref in sorted(sum(plan(mixed, step).packs, ()), key=lambda r: r.slot)
            if ref.dataset == name
        ]
        whole = len(stream) // count * count
        for start in range(0, whole, count):
            assert sorted(stream[start : start + count]) == list(range(count))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 5])
def test_ranks_share_out_the_plan_and_all_have_as_many_packs(dp_size: int) -> None:
    for step in range(5):
        batch = plan(spec(), step)
        shares = [assign(batch, rank, dp_size) for rank in range(dp_size)]
        assert len({len(share) for share in shares}) == 1
        dealt = [pack for share in shares for pack in share]
        assert Counter(pack for pack in dealt if pack) == Counter(batch.packs)
        assert dealt.count(()) == len(dealt) - len(batch.packs)
        # Fillers come last, so that the first pack of every rank that has one is a real one.
        for share in shares:
            assert [bool(pack) for pack in share] == sorted(map(bool, share), reverse=True)


def test_a_rank_outside_the_mesh_is_an_error() -> None:
    with pytest.raises(PlanError, match="rank 2 is not within 0 to 1"):
        assign(plan(spec(), 0), 2, 2)


def test_packs_are_balanced_by_tokens() -> None:
    costs = np.array([100, 10, 10, 10, 10, 10, 10, 40], dtype=np.int64)
    batch = plan(spec(dataset(count=8, tokens=costs), samples=8, packs=2), 0)
    assert sorted(batch.tokens) == [100, 100]
    assert sum(len(pack) for pack in batch.packs) == 8
    for pack in batch.packs:
        assert [ref.slot for ref in pack] == sorted(ref.slot for ref in pack)


@settings(deadline=None, max_examples=25)
@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    more=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    samples=st.integers(1, 20),
    packs=st.integers(1, 20),
    weight=st.integers(1, 5),
)
def test_no_step_exceeds_the_bound_that_is_checked_before_the_run(
    costs: list[int], more: list[int], samples: int, packs: int, weight: int
) -> None:
    mixed = spec(
        dataset("a", len(costs), tokens=np.array(costs), weight=weight),
        dataset("b", len(more), tokens=np.array(more)),
        samples=samples,
        packs=min(samples, packs),
    )
    # So small datasets begin hundreds of epochs in as many slots as are drawn at once otherwise.
    with patch("kinodit.data.plan.DRAWN_AT_ONCE", 80):
        batches = [plan(mixed, step) for step in range(12)]
    for batch in batches:
        assert len(batch.packs) == min(samples, packs) and all(batch.packs)
        assert max(batch.tokens) <= mixed.worst_pack_tokens


def test_the_bound_is_exact_for_samples_of_one_size() -> None:
    fixed = spec(samples=8, packs=3)
    assert fixed.worst_pack_tokens == 30
    assert max(plan(fixed, 0).tokens) == 30
    spec(samples=8, packs=3, token_budget=30)
    with pytest.raises(PlanError) as error:
        spec(samples=8, packs=3, token_budget=29)
    for number in ("29", "8 samples", "10 tokens", "3 packs", "30", "packs_per_step to 4"):
        assert number in str(error.value)
    spec(samples=8, packs=4, token_budget=29)


def test_a_sample_above_the_budget_is_named_as_the_reason() -> None:
    with pytest.raises(PlanError, match="not even one fits"):
        spec(token_budget=9)


def test_more_packs_than_samples_is_an_error() -> None:
    with pytest.raises(PlanError, match="every pack needs a sample"):
        spec(samples=2, packs=3)


def test_nothing_to_train_on_is_an_error_with_the_reason() -> None:
    with pytest.raises(PlanError, match=r"data\.datasets is empty"):
        PlanSpec((), 1, 1, seed=0)
    with pytest.raises(PlanError, match=r"no sample of 9.*modality is video: 4 left; fps >= 99: 0"):
        dataset(
            count=9,
            eligible=Chosen(np.zeros(9, dtype=np.bool_)),
            selection=(("modality is video", 4), ("fps >= 99", 0)),
        )
    with pytest.raises(PlanError, match="same name"):
        spec(dataset(), dataset())
    with pytest.raises(PlanError, match="step -1 does not exist"):
        plan(spec(), -1)


def test_the_fingerprint_changes_with_everything_the_order_depends_on() -> None:
    chosen = np.array([1, 2, 3], dtype=np.int64)
    base = dataset(eligible=Chosen.of(chosen), tokens=np.array([1, 2, 3]))
    cost = CostModel(8, 4, 2, 1, "words")
    whole = spec(base, cost=cost, token_budget=1000)
    assert whole.fingerprint == spec(base, cost=cost, token_budget=1000).fingerprint
    of_cost: dict[str, Any] = {
        "video_tokens": 9,
        "image_tokens": 5,
        "audio_tokens": 3,
        "text_tokens": 2,
        "tokenizer": "bytes",
    }
    of_dataset: dict[str, Any] = {
        "name": "other",
        "content_hash": "def",
        "num_samples": 38,
        "weight": 2.0,
        "eligible": Chosen.of(np.array([1, 2, 4])),
        "tokens": np.array([1, 2, 4]),
    }
    changed = [
        replace(whole, seed=6),
        replace(whole, samples_per_step=9),
        replace(whole, packs_per_step=2),
        replace(whole, token_budget=999),
        replace(whole, datasets=(base, dataset("second"))),
    ]
    for field, value in of_cost.items():
        changed.append(replace(whole, cost=replace(cost, **{field: value})))
    for field, value in of_dataset.items():
        changed.append(replace(whole, datasets=(replace(base, **{field: value}),)))
    prints = {other.fingerprint for other in changed} | {whole.fingerprint}
    assert len(prints) == len(changed) + 1


def test_the_fingerprint_is_the_same_in_every_process_and_release() -> None:
    # A changed value makes every saved run refuse to resume: change it only on purpose.
    assert spec().fingerprint[:16] == "d123713a3467d3fd"
    assert indices(plan(spec(), 3)) == [3, 14, 5, 9, 13, 12, 17, 26]


SIZES = np.array([7, 19, 90, 33, 5, 60, 12, 41, 28, 3, 77], dtype=np.int64)


def budgeted(packing: str = "budget", **changes: Any) -> PlanSpec:
    chosen = dataset(count=len(SIZES), tokens=SIZES)
    fields: dict[str, Any] = {
        "packing": packing, "token_budget": 100, "cost": CostModel(90, None, parity_tokens=40),
        "cost_budget": 300, "window_steps": 3,
    }  # fmt: skip
    return spec(chosen, samples=8, packs=3, **{**fields, **changes})


@pytest.mark.parametrize("packing", ["budget", "class"])
def test_rounds_keep_epochs_exact_and_budgets(packing: str) -> None:
    one = budgeted(packing)
    batches = [plan(one, step) for step in range(33)]
    assert batches == [plan(one, step) for step in reversed(range(33))][::-1]
    refs = [ref for batch in batches for pack in batch.packs for ref in pack]
    assert Counter((ref.epoch, ref.index) for ref in refs) == Counter(
        (epoch, index) for epoch in range(24) for index in range(11)
    )
    for batch in batches:
        slots = sorted(ref.slot for pack in batch.packs for ref in pack)
        assert slots == list(range(len(slots))) and slots
        assert len(batch.packs) % 3 == 0
        assert max(batch.tokens) <= 100 and max(batch.costs) <= 300
        for pack, tokens, cost in zip(batch.packs, batch.tokens, batch.costs, strict=True):
            own = [int(SIZES[ref.index]) for ref in pack]
            assert tokens == sum(own) and cost == sum(n + n * n // 40 for n in own)


def test_a_window_holds_the_samples_of_its_steps() -> None:
    one, other = budgeted(window_steps=4), budgeted(window_steps=1)
    drawn = [
        Counter(
            ref.index for step in range(first, first + 4) for p in plan(s, step).packs for ref in p
        )
        for s in (one, other)
        for first in (0, 4)
    ]
    assert drawn[:2] == drawn[2:]


def test_a_round_of_classes_has_one_size() -> None:
    one = spec(
        dataset("a", 40, tokens=10), dataset("b", 40, tokens=25),
        samples=16, packs=2, packing="class", token_budget=50, window_steps=2,
    )  # fmt: skip
    for step in range(6):
        packs = plan(one, step).packs
        for first in range(0, len(packs), 2):
            names = {ref.dataset for pack in packs[first : first + 2] for ref in pack}
            assert len(names) == 1


def test_samples_above_a_budget_are_counted_before_the_run() -> None:
    with pytest.raises(PlanError, match=r"token_budget is 50, but 3 of the 11 .* up to 90"):
        budgeted(token_budget=50)
    with pytest.raises(PlanError, match=r"cost_budget is 200, but 2 of the 11 .* up to 292"):
        budgeted(cost_budget=200)
    with pytest.raises(PlanError, match=r"needs data\.token_budget"):
        budgeted(token_budget=None)


def test_the_fingerprint_changes_with_how_packs_are_filled() -> None:
    one = budgeted()
    table = ((1, 8, 8), (2, 8, 8))
    shape_of = np.zeros(11, dtype=np.int64)
    sized = replace(one.datasets[0], shapes=table, shape_of=shape_of)
    other = replace(one.datasets[0], shapes=table, shape_of=shape_of + 1)
    changed = [
        replace(one, packing="class"),
        replace(one, cost_budget=301),
        replace(one, window_steps=2),
        replace(one, cost=CostModel(90, None, parity_tokens=41)),
        replace(
            one, cost=replace(one.cost or CostModel(1, 1), grid=Grid(((1, 1),), (8, 8), (8, 8)))
        ),
        replace(one, datasets=(sized,)),
        replace(one, datasets=(other,)),
    ]
    prints = {spec_.fingerprint for spec_ in (one, *changed)}
    assert len(prints) == len(changed) + 1


def test_a_block_shuffle_keeps_epochs_exact_and_is_another_order() -> None:
    blocked = spec(dataset(chunk=5, block_chunks=2), samples=8)
    stream = [index for step in range(37) for index in indices(plan(blocked, step))]
    for start in range(0, len(stream), 37):
        assert sorted(stream[start : start + 37]) == list(range(37))
    whole = spec(samples=8)
    assert blocked.fingerprint != whole.fingerprint
    other = spec(dataset(chunk=5, block_chunks=3), samples=8)
    assert len({blocked.fingerprint, whole.fingerprint, other.fingerprint}) == 3
