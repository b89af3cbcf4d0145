"""Samples keep their shape within the recipe's size, and are decoded to what was planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig
from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef
from kinodit.data.quarantine import instead, substitute
from kinodit.data.record import Record
from kinodit.data.select import plan_spec
from kinodit.data.shapes import IMAGE, VIDEO, Grid, frames_at, grid_of, native_shapes
from kinodit.data.spec import CostModel, PlanError
from kinodit.data.window import num_window_starts
from kinodit.models.errors import ConfigError
from tests.data.clips import (
    clip_bytes,
    described,
    image_bytes,
    image_record,
    video_record,
    write_dataset,
)

COUNT = st.integers(1, 4000)


def layers(frames: int) -> int | None:
    """Of a codec that takes 1 + a multiple of 4 frames."""
    return 1 + (frames - 1) // 4 if frames % 4 == 1 else None


GRID = grid_of(layers, 17, (8, 16))


@settings(deadline=None, max_examples=100)
@given(
    frames=st.integers(1, 300),
    milli=st.sampled_from([5000, 12000, 23976, 24000, 29970, 60000]),
    fps=st.sampled_from([6.0, 8.0, 12.5, 24.0]),
)
def test_a_source_has_the_frames_that_a_window_of_them_fits(
    frames: int, milli: int, fps: float
) -> None:
    there = int(frames_at(np.array([frames]), np.array([milli]), fps)[0])
    config = DecodeConfig(num_frames=there, fps=fps)
    assert num_window_starts(frames, milli, config) > 0
    assert num_window_starts(frames, milli, replace(config, num_frames=there + 1)) == 0


@settings(deadline=None, max_examples=150)
@given(height=COUNT, width=COUNT, frames=st.integers(1, 200), image=st.booleans())
def test_sizes_are_within_the_recipe_and_keep_the_aspect(
    height: int, width: int, frames: int, image: bool
) -> None:
    config = DecodeConfig(height=240, width=320, num_frames=17, fps=12.0)
    sizes, there = native_shapes(
        np.array([IMAGE if image else VIDEO]),
        np.array([frames]),
        np.array([24_000]),
        np.array([height]),
        np.array([width]),
        config,
        GRID,
    )
    t, h, w = sizes[0].tolist()
    assert t == 1 if image else t == max(n for n in (1, 5, 9, 13, 17) if n <= there[0])
    assert h % 8 == 0 and w % 16 == 0 and h and w
    scale = min(1.0, (240 * 320 / (height * width)) ** 0.5)
    for side, source, multiple in ((h, height, 8), (w, width, 16)):
        assert side <= max(source * scale, multiple)
        assert side > source * scale - multiple
    assert GRID.tokens((t, h, w)) == (1 + (t - 1) // 4) * (h // 8) * (w // 16)


def test_lengths_and_sides_may_be_fewer() -> None:
    grid = grid_of(layers, 17, (8, 16), (1, 9), 24)
    assert grid == Grid(((1, 1), (9, 3)), (8, 16), (24, 48))
    config = DecodeConfig(height=240, width=320, num_frames=17, fps=24.0)
    sizes, _ = native_shapes(
        np.array([VIDEO]),
        np.array([100]),
        np.array([24_000]),
        np.array([100]),
        np.array([100]),
        config,
        grid,
    )
    assert sizes.tolist() == [[9, 96, 96]]
    for wrong in (8, 21):
        with pytest.raises(ConfigError, match=f"data.lengths has {wrong}"):
            grid_of(layers, 17, (8, 16), (1, wrong))


SOURCES = {"wide": (30, 32, 96), "tall": (14, 96, 32), "small": (9, 24, 24), "short": (2, 48, 64)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Clips at 12 fps of `SOURCES`, and an image."""
    records = [
        video_record(
            key,
            clip_bytes(frames, 12, height=height, width=width),
            frames,
            12.0,
            height=height,
            width=width,
        )
        for key, (frames, height, width) in SOURCES.items()
    ]
    records.append(image_record("still", image_bytes("png", 48, 80), height=48, width=80))
    return write_dataset(tmp_path_factory.mktemp("shapes") / "mixed", records)


def config(dataset: Dataset, **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {
        "height": 48, "width": 48, "num_frames": 17, "fps": 12.0, "sizes": "own",
        "packing": "budget", "token_budget": 300, "samples_per_step": 4, "packs_per_step": 2,
        "num_threads": 1,
    }  # fmt: skip
    return DataConfig(
        datasets={"mixed": DatasetConfig(str(dataset.directory))}, **{**fields, **changes}
    )


COST = CostModel(100, 10, text_tokens=3, grid=GRID, parity_tokens=50)


@pytest.mark.parametrize("packing", ["budget", "class", "count"])
def test_what_is_decoded_has_the_planned_size(dataset: Dataset, packing: str) -> None:
    settings = config(dataset, packing=packing)
    datasets = {"mixed": dataset}
    spec = plan_spec(settings, datasets, COST, seed=0)
    expected = {
        "mixed:0": (17, 24, 80), "mixed:1": (13, 80, 16), "mixed:2": (9, 24, 16),
        "mixed:4": (1, 32, 48),
    }  # fmt: skip
    seen: dict[str, set[tuple[int, ...]]] = {}
    with Loader(spec, datasets, settings, end_step=3) as loader:
        for data in loader:
            for sample in (sample for pack in data.packs for sample in pack):
                assert sample.video is not None
                seen.setdefault(sample.ref.sample_id, set()).add(tuple(sample.video.shape[:3]))
    # "short" has two frames, and the codec takes one or five: one of them is trained on.
    assert seen == {**{key: {size} for key, size in expected.items()}, "mixed:3": {(1, 40, 48)}}


def test_a_substitute_comes_in_its_own_size(dataset: Dataset) -> None:
    spec = plan_spec(config(dataset), {"mixed": dataset}, COST, seed=0)
    ref = SampleRef(0, "mixed", 1, 0, (13, 80, 16))
    assert instead(spec, ref, 0) == structs.replace(ref, index=0, shape=(17, 24, 80))
    found = substitute(spec, dataset, 0, ref, [1])
    assert (
        found.shape
        == spec.datasets[0].shapes[int(np.asarray(spec.datasets[0].shape_of)[found.index])]
    )


def test_a_clip_without_any_length_is_left_out_and_counted(dataset: Dataset) -> None:
    longer = replace(COST, grid=grid_of(lambda t: layers(t) if t > 1 else None, 17, (8, 16)))
    with pytest.raises(PlanError, match="1 of its 4 samples are still images"):
        plan_spec(config(dataset), {"mixed": dataset}, replace(longer, image_tokens=None), 0)
    spec = plan_spec(config(dataset), {"mixed": dataset}, longer, seed=0)
    eligible = spec.datasets[0].eligible
    assert eligible is not None and eligible.numbers().tolist() == [0, 1, 2]
    assert ("has a length that the codec takes at 12 fps", 3) in spec.datasets[0].selection


def test_a_clip_that_is_too_long_is_an_error_or_windowed(dataset: Dataset) -> None:
    with pytest.raises(PlanError, match=r"1 of its 5 samples have more than data\.num_frames"):
        plan_spec(config(dataset, too_long="error"), {"mixed": dataset}, COST, seed=0)
    plan_spec(config(dataset, too_long="window"), {"mixed": dataset}, COST, seed=0)


def test_unknown_sizes_are_refused(tmp_path: Path) -> None:
    record: Record = video_record("a", clip_bytes(9, 12), 9, 12.0)
    unknown = described(record, width=0)
    dataset = write_dataset(tmp_path / "unknown", [record, unknown_of(unknown)])
    with pytest.raises(PlanError, match=r"how large 1 of its 2 samples are .the first is sample 1"):
        plan_spec(config(dataset), {"mixed": dataset}, COST, seed=0)


def unknown_of(record: Record) -> Record:
    return structs.replace(record, key="b")
