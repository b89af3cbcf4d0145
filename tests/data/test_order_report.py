"""What a plan is said to do is what its steps do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kinodit.data.manifest import Dataset
from kinodit.data.order_report import collect
from kinodit.data.spec import CostModel, DatasetSpec, PlanSpec
from tests.data.shards import write_images

TOKENS = np.array([10] * 60 + [40] * 20, dtype=np.int64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """80 images in many shards."""
    made = write_images(tmp_path_factory.mktemp("report") / "images", 80, 10_000)
    assert len(made.manifest.shards) > 15
    return made


def spec(dataset: Dataset, **changes: object) -> PlanSpec:
    part = DatasetSpec("images", dataset.content_hash, 80, tokens=TOKENS)
    one = PlanSpec((part,), 8, 2, seed=1, packing="budget", token_budget=100,
                   cost=CostModel(40, 10, parity_tokens=20))  # fmt: skip
    return replace(one, **changes)  # type: ignore[arg-type]


def test_classes_and_epochs_are_counted(dataset: Dataset) -> None:
    report = collect(spec(dataset), {"images": dataset}, 2, 20)
    (line,) = report.datasets
    assert (line.num_eligible, line.epoch_steps, line.share) == (80, 10.0, 1.0)
    # 10 tokens cost 15, 40 cost 120: a quarter of the samples, 8/11 of the cost.
    assert [(c.shape, c.tokens, c.samples) for c in report.classes] == [
        (None, 40, 0.25),
        (None, 10, 0.75),
    ]
    assert [c.cost for c in report.classes] == pytest.approx([2400 / 3300, 900 / 3300])
    assert report.tokens == Counter(TOKENS.tolist())


def test_steps_are_measured(dataset: Dataset) -> None:
    steps = collect(spec(dataset), {"images": dataset}, 2, 10).steps
    assert steps.num_steps == 10 and steps.samples == (8, 8.0, 8)
    # One epoch: its tokens over packs of 100; its bytes are those of all samples.
    assert steps.used == pytest.approx(TOKENS.sum() / (10 * steps.packs) / 100)
    assert steps.bytes * 10 == dataset.column("size").sum()
    assert steps.rounds == steps.packs / 2
    assert 1.0 <= steps.waiting < 2.0
    alone = collect(spec(dataset), {"images": dataset}, 1, 10).steps
    assert alone.waiting == 1.0 and alone.rounds == steps.packs
    many = collect(spec(dataset), {"images": dataset}, 8, 10).steps
    assert many.waiting > 2.0 and many.empty >= 0.5


def test_a_block_shuffle_reads_from_fewer_shards_and_says_what_it_costs(dataset: Dataset) -> None:
    full = spec(dataset)
    blocks = replace(full, datasets=(replace(full.datasets[0], chunk=4, block_chunks=2),))
    one, other = (collect(s, {"images": dataset}, 2, 50).steps for s in (full, blocks))
    assert other.shards < one.shards / 1.5
    assert other.same_shard > 2 * one.same_shard
    assert one.same_shard == pytest.approx(one.same_if_full, rel=0.1)
    assert one.design_effect == pytest.approx(1.0, abs=0.02)
    lost = (1 + 0.1 * (other.same_shard - 1)) / (1 + 0.1 * (other.same_if_full - 1))
    assert other.design_effect == pytest.approx(lost) and lost > 1.1


def test_whole_windows_are_looked_at(dataset: Dataset) -> None:
    windowed = spec(dataset, window_steps=4)
    assert collect(windowed, {"images": dataset}, 2, 6).steps.num_steps == 8
