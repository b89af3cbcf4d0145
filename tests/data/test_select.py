"""Filters leave what they say, once, and say what they left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinodit.data.config import DataConfig, DatasetConfig, RangeConfig, WhereConfig
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardReader
from kinodit.data.record import Record
from kinodit.data.select import check_epochs, open_datasets, plan_spec
from kinodit.data.shapes import Grid
from kinodit.data.spec import CostModel, PlanError, PlanSpec
from kinodit.models.errors import ConfigError
from tests.data.clips import described, small_records, sound_record, video_record, write_dataset

COST = CostModel(video_tokens=100, image_tokens=10, audio_tokens=7, text_tokens=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """15 clips (one second at 12 fps) and images, one longer clip with sound, and one sound."""
    records = small_records(15)
    clip = bytes(records[0].members["mp4"])
    records.append(video_record("longer", clip, 48, 24.0, has_audio=True, width=128))
    sound = sound_record("sound", b"", 5.0)
    records.append(described(sound, has_audio=False))
    return write_dataset(tmp_path_factory.mktemp("select") / "clips", records)


def config(dataset: Dataset, where: WhereConfig | None = None, **changes: Any) -> DataConfig:
    entry = DatasetConfig(path=str(dataset.directory), where=where or WhereConfig())
    fields: dict[str, Any] = {"num_frames": 8, "fps": 8.0, "height": 48, "width": 64}
    return DataConfig(datasets={"clips": entry}, **fields | changes)


def eligible(dataset: Dataset, where: WhereConfig, **changes: Any) -> list[int]:
    spec = plan_spec(config(dataset, where, **changes), {"clips": dataset}, COST, seed=0)
    found = spec.datasets[0].eligible
    return list(range(len(dataset))) if found is None else found.numbers().tolist()


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
    clip = bytes(small_records(1)[0].members["mp4"])
    unknown: list[Record] = [video_record("foreign", clip, 0, 0.0, width=0, height=0)]
    assert eligible(write_dataset(tmp_path / "clips", unknown), WhereConfig()) == [0]


def test_stills_are_refused_by_a_codec_that_takes_none(dataset: Dataset) -> None:
    cost = replace(COST, image_tokens=None)
    with pytest.raises(PlanError, match=r"3 of its 16 samples are still images.*modality=video"):
        plan_spec(config(dataset), {"clips": dataset}, cost, seed=0)
    only_clips = config(dataset, WhereConfig(modality="video"))
    assert plan_spec(only_clips, {"clips": dataset}, cost, seed=0).datasets[0].num_eligible == 13


def spec_with(dataset: Dataset, **changes: Any) -> PlanSpec:
    entry = DatasetConfig(path=str(dataset.directory), **changes)
    settings = replace(config(dataset), datasets={"clips": entry})
    return plan_spec(settings, {"clips": dataset}, COST, seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modality == 'image'", IMAGES),
        ("motion >= 0.8", [12, 13, 14]),
        ("width > 64 or motion < 0.2", [0, 1, 2, 15]),
        ("extra.action == 'b' and modality == 'video'", [1, 7, 10, 13]),
        ("has_audio", [15]),
        ("aspect > 1.4 and short_side == 48 and lang == 'en'", [15]),
        ("duration_s > 1.5 and fps == 24 and num_frames == 48 and pixels == 6144", [15]),
    ],
)
def test_a_filter_expression_keeps_what_it_says(
    dataset: Dataset, text: str, expected: list[int]
) -> None:
    spec = spec_with(dataset, filter=text)
    eligible = spec.datasets[0].eligible
    assert eligible is not None and eligible.numbers().tolist() == expected
    assert spec.datasets[0].selection[-1] == (text, len(expected))


def test_a_filter_reads_records_only_where_it_has_to(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = ShardReader.read

    def noted(self: ShardReader, index: int) -> Record:
        read.append(index)
        return real(self, index)

    monkeypatch.setattr(ShardReader, "read", noted)
    spec_with(dataset, filter="width > 64")
    assert read == []
    spec_with(dataset, where=WhereConfig(modality="image"), filter="motion > 0.5")
    assert read == IMAGES


def test_a_filter_that_leaves_nothing_is_told_with_what_it_left(dataset: Dataset) -> None:
    with pytest.raises(PlanError, match="motion > 2: 0 left"):
        spec_with(dataset, filter="motion > 2")
    with pytest.raises(ConfigError, match="is no field"):
        DatasetConfig(path="x", filter="speed > 2")


def test_a_cap_takes_the_same_samples_for_every_seed(dataset: Dataset) -> None:
    chosen = spec_with(dataset, max_samples=5).datasets[0].eligible
    assert chosen is not None and len(chosen) == 5
    kept = chosen.numbers()
    assert kept.tolist() == sorted(kept.tolist()) != list(range(5))
    entry = DatasetConfig(path=str(dataset.directory), max_samples=5)
    settings = replace(config(dataset), datasets={"other": entry})
    again = plan_spec(settings, {"other": dataset}, COST, seed=9).datasets[0].eligible
    assert again is not None and again.numbers().tolist() == kept.tolist()
    assert spec_with(dataset, max_samples=500).datasets[0].eligible is not None


def test_repeats_decide_shares(dataset: Dataset) -> None:
    path = str(dataset.directory)
    images = WhereConfig(modality="image")
    entries = {
        "all": DatasetConfig(path, repeat=1.0),
        "images": DatasetConfig(path, repeat=4.0, where=images),
    }
    settings = replace(config(dataset), datasets=entries)
    spec = plan_spec(settings, {"all": dataset, "images": dataset}, COST, seed=0)
    assert spec.mixture.shares == (4, 3)
    assert spec.epochs(7 * 2)["images"] == 4 * spec.epochs(7 * 2)["all"]
    with pytest.raises(ConfigError, match="repeat 2 and weight 3"):
        DatasetConfig(path, repeat=2.0, weight=3.0)
    with pytest.raises(ConfigError, match="some datasets have a repeat"):
        replace(settings, datasets={**entries, "third": DatasetConfig(path)})


def test_more_epochs_than_allowed_are_refused(dataset: Dataset) -> None:
    entry = DatasetConfig(path=str(dataset.directory), max_epochs=2.0)
    settings = replace(config(dataset), datasets={"clips": entry})
    spec = plan_spec(settings, {"clips": dataset}, COST, seed=0)
    check_epochs(settings, spec, 4)
    with pytest.raises(PlanError, match=r"gone through 2.50 times in 5 steps"):
        check_epochs(settings, spec, 5)


def test_block_shuffle_is_for_datasets_that_are_not_on_a_file_system(dataset: Dataset) -> None:
    datasets = {"clips": dataset}
    remote = replace(config(dataset), datasets={"clips": DatasetConfig("s3://bucket/clips")})
    chunks = {
        (shuffle, settings.datasets["clips"].path[:2]): plan_spec(
            replace(settings, shuffle=shuffle, block_shards=3), datasets, COST, seed=0
        ).datasets[0]
        for shuffle in ("auto", "full", "block")
        for settings in (config(dataset), remote)
    }
    blocked = {key for key, spec in chunks.items() if spec.chunk}
    local = config(dataset).datasets["clips"].path[:2]
    assert blocked == {("auto", "s3"), ("block", "s3"), ("block", local)}
    # 16 samples take part, of two shards.
    assert {(s.chunk, s.block_chunks) for s in chunks.values()} == {(0, 0), (8, 3)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"filter": "width > 64 or motion > 0.5"},
        {"where": WhereConfig(modality="video"), "max_samples": 7},
    ],
)
def test_pieces_of_an_index_give_what_the_whole_gives(
    dataset: Dataset, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = DatasetConfig(path=str(dataset.directory), **changes)
    grid = Grid(((1, 1), (4, 2), (8, 3)), (8, 8), (8, 8))
    for sizes, cost in (("recipe", COST), ("own", replace(COST, grid=grid))):
        settings = replace(config(dataset, sizes=sizes), datasets={"clips": entry})
        specs = []
        for samples in (1 << 19, 1):
            monkeypatch.setattr("kinodit.data.manifest.PIECE_SAMPLES", samples)
            specs.append(plan_spec(settings, {"clips": dataset}, cost, seed=0))
        whole, pieces = specs
        assert len(dataset.manifest.shards) > 1
        assert pieces.fingerprint == whole.fingerprint
        assert pieces.datasets[0].selection == whole.datasets[0].selection
