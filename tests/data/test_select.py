"""Filters leave what they say, once, and say what they left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinodit.data.config import DataConfig, DatasetConfig, RangeConfig, WhereConfig
from kinodit.data.manifest import Dataset
from kinodit.data.record import Record
from kinodit.data.select import open_datasets, plan_spec
from kinodit.data.spec import CostModel, PlanError
from tests.data.clips import small_records, sound_record, video_record, write_dataset

COST = CostModel(video_tokens=100, image_tokens=10, audio_tokens=7, text_tokens=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """15 clips (one second at 12 fps) and images, one longer clip with sound, and one sound."""
    records = small_records(15)
    clip = records[0].members["mp4"]
    records.append(video_record("longer", clip, 48, 24.0, has_audio=True, width=128))
    sound = sound_record("sound", b"", 5.0)
    records.append(replace(sound, meta=replace(sound.meta, has_audio=False)))
    return write_dataset(tmp_path_factory.mktemp("select") / "clips", records)


def config(dataset: Dataset, where: WhereConfig | None = None, **changes: Any) -> DataConfig:
    entry = DatasetConfig(path=str(dataset.directory), where=where or WhereConfig())
    fields: dict[str, Any] = {"num_frames": 8, "fps": 8.0, "height": 48, "width": 64}
    return DataConfig(datasets={"clips": entry}, **fields | changes)


def eligible(dataset: Dataset, where: WhereConfig, **changes: Any) -> list[int]:
    spec = plan_spec(config(dataset, where, **changes), {"clips": dataset}, COST, seed=0)
    found = spec.datasets[0].eligible
    return list(range(len(dataset))) if found is None else found.tolist()


IMAGES = [4, 9, 14]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (WhereConfig(), list(range(16))),
        (WhereConfig(modality="image"), IMAGES),
        (WhereConfig(modality="video"), [i for i in range(16) if i not in IMAGES]),
        (WhereConfig(has_audio=True), [15]),
        (WhereConfig(has_audio=False), list(range(15))),
        (WhereConfig(num_frames=RangeConfig(min=13)), [15]),
        (WhereConfig(duration_s=RangeConfig(min=1.5, max=2.5)), [15]),
        (WhereConfig(fps=RangeConfig(max=0)), IMAGES),
        (WhereConfig(width=RangeConfig(min=65)), [15]),
        (WhereConfig(height=RangeConfig(max=47)), None),
        (WhereConfig(scores={"motion": RangeConfig(max=0.2)}), [0, 1, 2, 3]),
        (WhereConfig(scores={"motion": RangeConfig()}), list(range(15))),
        (WhereConfig(extra={"action": "b"}), [1, 4, 7, 10, 13]),
        (WhereConfig(modality="image", extra={"action": "a"}), [9]),
    ],
)
def test_filters(dataset: Dataset, where: WhereConfig, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(PlanError, match="no sample of 17"):
            eligible(dataset, where)
    else:
        assert eligible(dataset, where) == expected


def test_clips_shorter_than_the_window_are_left_out_and_counted(dataset: Dataset) -> None:
    # 12 frames at 12 fps hold 8 frames at 8 fps, whose last is frame 10, but not 9 of them at 8
    # fps, whose last would be frame 12.
    assert 0 in eligible(dataset, WhereConfig())
    assert eligible(dataset, WhereConfig(modality="video"), num_frames=9) == [15]
    spec = plan_spec(config(dataset, num_frames=9), {"clips": dataset}, COST, seed=0)
    assert spec.datasets[0].selection[:2] == (
        ("has a picture (data.use_audio is false)", 16),
        ("a video has 9 frames at 8 fps", 4),
    )


def test_sound_takes_part_when_the_recipe_uses_it(dataset: Dataset) -> None:
    assert 16 in eligible(dataset, WhereConfig(), use_audio=True)


def test_costs_are_those_of_what_a_sample_consists_of(dataset: Dataset) -> None:
    spec = plan_spec(config(dataset, use_audio=True), {"clips": dataset}, COST, seed=0)
    tokens = spec.datasets[0].tokens
    assert not isinstance(tokens, int)
    assert tokens[[0, 4, 15, 16]].tolist() == [103, 13, 110, 10]
    only_images = config(dataset, WhereConfig(modality="image"))
    assert plan_spec(only_images, {"clips": dataset}, COST, seed=0).datasets[0].tokens == 13


def test_what_nothing_passes_is_an_error_with_every_count(dataset: Dataset) -> None:
    where = WhereConfig(modality="video", scores={"motion": RangeConfig(min=2)})
    with pytest.raises(PlanError) as error:
        eligible(dataset, where)
    for part in ("data.datasets.clips", "17", "modality is video: 13 left", "motion >= 2: 0 left"):
        assert part in str(error.value)


def test_a_filter_changes_the_fingerprint_by_what_it_leaves(dataset: Dataset) -> None:
    def fingerprint(where: WhereConfig) -> str:
        return plan_spec(config(dataset, where), {"clips": dataset}, COST, seed=0).fingerprint

    assert fingerprint(WhereConfig()) != fingerprint(WhereConfig(modality="video"))
    assert fingerprint(WhereConfig()) == fingerprint(WhereConfig(height=RangeConfig(max=9999)))


def test_too_large_pictures_are_left_out(dataset: Dataset) -> None:
    assert 15 not in eligible(dataset, WhereConfig(), max_pixels=64 * 48)
    assert eligible(dataset, WhereConfig(), max_duration_s=1.5) == list(range(15))


def test_a_recipe_without_datasets_says_how_to_name_one() -> None:
    with pytest.raises(PlanError, match=r"data\.datasets\.clips\.path=PATH"):
        open_datasets(DataConfig())


def test_datasets_are_opened_by_name(dataset: Dataset) -> None:
    found: Mapping[str, Dataset] = open_datasets(config(dataset))
    assert list(found) == ["clips"] and len(found["clips"]) == 17


def test_foreign_shards_without_geometry_are_not_left_out(tmp_path: Path) -> None:
    clip = small_records(1)[0].members["mp4"]
    unknown: list[Record] = [video_record("foreign", clip, 0, 0.0, width=0, height=0)]
    assert eligible(write_dataset(tmp_path / "clips", unknown), WhereConfig()) == [0]


def test_stills_are_refused_by_a_codec_that_takes_none(dataset: Dataset) -> None:
    cost = replace(COST, image_tokens=None)
    with pytest.raises(PlanError, match=r"3 of its 16 samples are still images.*modality=video"):
        plan_spec(config(dataset), {"clips": dataset}, cost, seed=0)
    only_clips = config(dataset, WhereConfig(modality="video"))
    assert plan_spec(only_clips, {"clips": dataset}, cost, seed=0).datasets[0].num_eligible == 13
