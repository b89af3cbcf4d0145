"""A bad sample is replaced by rule: the same one everywhere, of its cost, and never too many."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

from kinodit.data.chosen import Chosen
from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig, QuarantineConfig
from kinodit.data.decode import DecodedSample, DecodeError, decode
from kinodit.data.loader import Loader, LoadError, StepData
from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef, plan
from kinodit.data.quarantine import Fault, QuarantineError, Quotas, Replacement, substitute
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel, DatasetSpec, PlanSpec
from kinodit.models.errors import ConfigError
from tests.data.clips import clip_bytes, small_records, video_record, write_dataset
from tests.support.quick import quick

BAD = (3, 11)
STEPS = 8
THREADS, PROCESSES = {"num_threads": 4}, {"workers": "processes"}
SETTINGS = DataConfig(
    num_frames=4, fps=6.0, height=24, width=24, samples_per_step=7, packs_per_step=3,
    quarantine=QuarantineConfig(max_shard_share=1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """23 samples: one with garbage for a medium, one whose bytes changed after it was indexed."""
    records = small_records(23)
    records[BAD[0]] = structs.replace(records[BAD[0]], members={"mp4": b"garbage" * 100})
    made = write_dataset(tmp_path_factory.mktemp("bad") / "clips", records)
    flip(made, BAD[1])
    return made


def flip(dataset: Dataset, index: int) -> None:
    path, offset, _ = dataset.locate(index)
    data = bytearray(path.read_bytes())
    data[offset + 700] ^= 1
    path.write_bytes(data)


def settings_of(dataset: Dataset, **changes: Any) -> DataConfig:
    return replace(SETTINGS, datasets={"clips": DatasetConfig(str(dataset.directory))}, **changes)


def load(
    dataset: Dataset, rank: int = 0, size: int = 1, start: int = 0, **changes: Any
) -> list[StepData]:
    settled = changes.pop("settled", None)
    settings = settings_of(dataset, **changes)
    spec = plan_spec(settings, {"clips": dataset}, CostModel(20, 5, 0, 3), seed=11)
    with Loader(
        spec, {"clips": dataset}, settings, rank, size, start, STEPS, settled=settled
    ) as loader:
        return list(loader)


def by_slot(steps: list[StepData]) -> dict[tuple[int, int], DecodedSample]:
    return {(s.step, x.ref.slot): x for s in steps for pack in s.packs for x in pack}


def replaced(steps: list[StepData]) -> dict[tuple[int, int], Replacement]:
    return {(item.step, item.slot): item for data in steps for item in data.replaced}


def test_every_bad_sample_is_replaced_by_one_of_its_cost_and_named(dataset: Dataset) -> None:
    steps = load(dataset)
    spec = plan_spec(settings_of(dataset), {"clips": dataset}, CostModel(20, 5, 0, 3), seed=11)
    expected = {
        (step, ref.slot): ref.index
        for step in range(STEPS)
        for pack in plan(spec, step).packs
        for ref in pack
        if ref.index in BAD
    }
    found = replaced(steps)
    assert {place: item.wanted for place, item in found.items()} == expected
    assert set(expected.values()) == set(BAD), "both came up"
    samples = by_slot(steps)
    assert len(samples) == STEPS * 7
    for place, item in found.items():
        sample = samples[place]
        assert sample.ref.index == item.used not in BAD
        assert dataset.row(item.used).modality == dataset.row(item.wanted).modality
        fault = item.faults[0]
        shard, offset, _ = dataset.locate(item.wanted)
        assert (fault.shard, fault.offset) == (str(shard), offset)
        assert fault.key == f"s{item.wanted:04d}"
        assert ("CRC-32" if item.wanted == BAD[1] else "damaged or not mp4") in fault.reason


@pytest.mark.parametrize(
    ("size", "changes"),
    quick(
        itertools.product([2, 3], [THREADS, PROCESSES]),
        (3, THREADS),
        (2, PROCESSES),
    ),
    ids=str,
)
def test_ranks_threads_and_processes_take_the_same_substitutes(
    dataset: Dataset, changes: dict[str, Any], size: int
) -> None:
    alone = load(dataset)
    ranks = [load(dataset, rank, size, **changes) for rank in range(size)]
    samples = {key: x for part in ranks for key, x in by_slot(part).items()}
    assert {key: item for part in ranks for key, item in replaced(part).items()} == replaced(alone)
    for key, sample in by_slot(alone).items():
        other = samples[key]
        assert sample.video is not None and other.video is not None
        assert torch.equal(sample.video, other.video)
        assert structs.replace(sample, video=None) == structs.replace(other, video=None)


def test_a_shard_that_was_cut_off_costs_what_was_behind_the_cut(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "clips", small_records(23))
    path, offset, _ = made.locate(20)
    os.truncate(path, offset + 512)
    behind = {i for i in range(23) if made.locate(i)[0] == path and made.locate(i)[1] >= offset}
    steps = load(made, quarantine=QuarantineConfig(max_shard_share=1.0, max_step_share=1.0))
    found = replaced(steps)
    assert {item.wanted for item in found.values()} == behind >= {20, 21, 22}
    for item in found.values():
        assert item.used not in behind and "is cut off" in item.faults[0].reason
    assert len(by_slot(steps)) == STEPS * 7


def test_a_ledger_decides_what_a_replayed_step_holds(dataset: Dataset) -> None:
    """A sample that took too long once is not tried again where it was replaced."""
    place, sample = next(iter(by_slot(load(dataset)).items()))
    index = sample.ref.index
    other = next(i for i in range(23) if i not in (*BAD, index))
    slow = Replacement(*place, "clips", index, other, (Fault(index, "000.tar", 0, "k", "slow"),))
    again = load(dataset, settled={place: slow})
    assert by_slot(again)[place].ref.index == other
    assert replaced(again)[place] == slow
    rest = {key: x.ref for key, x in by_slot(again).items() if key != place}
    plain = {key: x.ref for key, x in by_slot(load(dataset)).items() if key != place}
    assert rest == plain
    with pytest.raises(LoadError, match="ledger is of another data order"):
        load(dataset, settled={place: replace(slow, wanted=other)})


def test_ranks_that_share_packs_settle_on_one_sample(dataset: Dataset) -> None:
    settings = settings_of(dataset)
    spec = plan_spec(settings, {"clips": dataset}, CostModel(20, 5, 0, 3), seed=11)
    with Loader(spec, {"clips": dataset}, settings) as loader:
        data = next(loader)
        taken = {x.ref.slot: x for pack in data.packs for x in pack}
        slot = next(s for s in taken if s not in {item.slot for item in data.replaced})
        index = taken[slot].ref.index
        other = next(i for i in range(23) if i not in (*BAD, index))
        fault = Fault(index, "s", 0, "k", "slow")
        wish = Replacement(0, slot, "clips", index, other, (fault,))
        settled = loader.settle(data, {slot: wish})
        now = {x.ref.slot: x for pack in settled.packs for x in pack}
        assert now[slot].ref.index == other and wish in settled.replaced
        assert all(now[s] is taken[s] for s in taken if s != slot)
        assert loader.settle(settled, {slot: wish}) == settled


def test_a_place_is_given_up_after_so_many_attempts(tmp_path: Path) -> None:
    records = [structs.replace(r, members={"mp4": b"x" * 99}) for r in small_records(4)]
    bad = write_dataset(tmp_path / "clips", records)
    with pytest.raises(LoadError, match=r"3 samples in a row.*max_attempts is 3"):
        load(bad, quarantine=QuarantineConfig(max_attempts=3))
    with pytest.raises(LoadError, match=r"nothing can replace sample clips:\d.*4 did"):
        load(bad)


def spec_of(tokens: Any, eligible: Any = None, size: int = 1000) -> PlanSpec:
    part = DatasetSpec("d", "h", size, eligible=eligible, tokens=tokens)
    return PlanSpec((part,), 4, 2, 5)


class Rows:
    """A dataset of videos, as far as choosing a substitute asks."""

    def row(self, index: int) -> Any:
        return type("Row", (), {"modality": 0})


def test_substitutes_have_the_same_cost_even_where_it_is_rare() -> None:
    tokens = np.full(1000, 7)
    tokens[[5, 900]] = 1234
    rows: Any = Rows()
    ref = SampleRef(2, "d", 5, 0)
    assert substitute(spec_of(tokens), rows, 3, ref, [5]).index == 900
    # None of that cost is left: the next cheaper one, since a budget must hold.
    assert tokens[substitute(spec_of(tokens), rows, 3, ref, [5, 900]).index] == 7
    eligible = np.arange(0, 2000, 2)
    chosen = substitute(
        spec_of(tokens, Chosen.of(eligible), 2000), rows, 3, SampleRef(2, "d", 10, 0), [10]
    )
    assert chosen.index == 1800
    some = {
        substitute(spec_of(7), rows, step, SampleRef(slot, "d", 5, 0), [5]).index
        for step in range(10)
        for slot in range(4)
    }
    assert len(some) > 30, "different places draw different substitutes"


def test_lines_of_the_ledger_are_read_back() -> None:
    item = Replacement(4, 1, "clips", 3, 9, (Fault(3, "a.tar", 512, "k", "why"),))
    assert Replacement.parse(item.to_json()) == item
    assert str(item).startswith("step 4, slot 1: sample clips:3 (a.tar at byte 512) was replaced")
    for row in (None, {}, {**item.to_json(), "more": 1}, {**item.to_json(), "used": -1}):
        with pytest.raises(QuarantineError):
            Replacement.parse(row)


def test_quotas_count_different_samples_of_a_shard_and_of_a_step(dataset: Dataset) -> None:
    shard = str(dataset.locate(0)[0])
    size = dataset.manifest.shards[0].num_samples

    def bad(step: int, slot: int, offset: int) -> Replacement:
        return Replacement(step, slot, "clips", 0, 1, (Fault(0, shard, offset, "", "why"),))

    quotas = Quotas(QuarantineConfig(max_shard_share=0.5), {"clips": dataset}, 100)
    for step in range(9):
        quotas.count([bad(step, 0, 512 * (step % 2))])
        quotas.check([bad(step, 0, 0)])
    assert quotas.num_bad == 2
    quotas.count([bad(0, 0, 512 * offset) for offset in range(size)])
    with pytest.raises(QuarantineError, match=rf"{size} of the {size} samples of {shard} are bad"):
        quotas.check([bad(9, 0, 0)])
    wide = Quotas(QuarantineConfig(max_step_share=0.25), {"clips": dataset}, 100)
    wide.check([bad(0, slot, 0) for slot in range(25)])
    with pytest.raises(QuarantineError, match="26 of the 100 samples of step 0"):
        wide.check([bad(0, slot, 0) for slot in range(26)])


def test_wrong_quotas_are_refused() -> None:
    for changes in ({"max_attempts": 1}, {"max_step_share": 1.1}, {"max_shard_share": -0.1}):
        with pytest.raises(ConfigError, match=r"data\.quarantine\."):
            QuarantineConfig(**changes)


def test_a_decoder_that_takes_too_long_is_stopped() -> None:
    record = video_record("long", clip_bytes(100, 24, keyframe_every=100), 100, 24.0)
    config = DecodeConfig(height=48, width=64, num_frames=2, fps=24.0, decode_limit_s=1e-9)
    with pytest.raises(DecodeError, match=r"longer than the 1e-09 s that data\.decode_limit_s"):
        decode(record, config, 0.999)
