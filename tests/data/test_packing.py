"""Packing moves values, adds nothing and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinodit.data.packing import (
    EncodedSample,
    LevelsPer,
    PackSpec,
    Patch,
    StreamSpec,
    concatenate,
    filler,
    pack,
    patch_grid,
    patchify,
    positions,
    split,
    unpatchify,
)
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal
from kinodit.models.tokens import Role, SampleKey, TokenBatch

PATCH: Patch = (1, 2, 2)
SPEC = PackSpec(
    streams=(StreamSpec("text", 5), StreamSpec("video", 3, PATCH)), conditions={"text_pooled": 4}
)
GRIDS = [(4, 4, 6), (1, 2, 2), (2, 8, 4), (3, 2, 10)]


def sample(number: int, *, with_video: bool = True) -> EncodedSample:
    source = generator("packing", number)
    grid = GRIDS[number % len(GRIDS)]
    return EncodedSample(
        key=SampleKey(3, number, f"clips:{number}"),
        latents={"video": normal(source, (3, *grid))} if with_video else {},
        seconds={"video": 0.25 + number} if with_video else {},
        text={"text": normal(source, (1 + number % 3, 5))},
        conditions={"text_pooled": normal(source, (4,))},
    )


def assert_equal(one: TokenBatch, other: TokenBatch) -> None:
    assert one.samples == other.samples
    assert list(one.modalities) == list(other.modalities)
    for name, tokens in one.modalities.items():
        for field, values in vars(tokens).items():
            expected = getattr(other.modalities[name], field)
            assert values.dtype == expected.dtype, (name, field)
            assert torch.equal(values, expected), (name, field)
    assert torch.equal(one.level_segment, other.level_segment)
    assert torch.equal(one.level_t, other.level_t)
    for name, vectors in one.conditions.items():
        assert torch.equal(vectors, other.conditions[name])
    for field in ("lengths", "segments", "visible"):
        assert getattr(one.layout, field) == getattr(other.layout, field), field
    for field in ("order", "inverse"):
        mine, theirs = getattr(one.layout, field), getattr(other.layout, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@settings(deadline=None, max_examples=40)
@given(
    patches=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.tuples(*[st.integers(1, 3)] * 3),
    channels=st.integers(1, 4),
)
def test_patchify_and_back(patches: Patch, patch: Patch, channels: int) -> None:
    cells = [n * p for n, p in zip(patches, patch, strict=True)]
    latents = torch.arange(channels * cells[0] * cells[1] * cells[2]).reshape(channels, *cells)
    tokens = patchify(latents, patch)
    assert tokens.shape == (patches[0] * patches[1] * patches[2], latents.numel() // len(tokens))
    assert patch_grid(latents.shape, patch) == patches
    assert torch.equal(unpatchify(tokens, patches, patch), latents)


def test_the_order_of_values_is_the_documented_one() -> None:
    latents = torch.arange(2 * 2 * 4 * 6, dtype=torch.float32).reshape(2, 2, 4, 6)
    tokens = patchify(latents, (1, 2, 3))
    # Token (t=1, row 0, column 1): channels outermost, then rows, columns fastest.
    expected = latents[:, 1, 0:2, 3:6].reshape(-1)
    assert torch.equal(tokens[1 * 4 + 0 * 2 + 1], expected)
    weight = torch.randn(7, 2, 1, 2, 3)
    convolved = torch.nn.functional.conv3d(latents[None], weight, stride=(1, 2, 3))
    projected = tokens @ weight.reshape(7, -1).T
    assert torch.allclose(projected.T.reshape(7, 2, 2, 2), convolved[0], atol=1e-4)


def test_positions_are_seconds_rows_and_columns_of_patches() -> None:
    grid = positions((2, 3, 4), patch_s=0.5)
    assert grid.shape == (24, 3) and grid.dtype == torch.float32
    assert grid[0].tolist() == [0, 0, 0]
    assert grid[1 * 12 + 2 * 4 + 3].tolist() == [0.5, 2, 3]
    spec = PackSpec((StreamSpec("video", 3, (2, 2, 2)),))
    long = replace(sample(0), seconds={"video": 0.25})
    batch = pack([long], spec)
    # A patch of two latent frames begins every second one.
    assert sorted(set(batch.modalities["video"].position[:, 0].tolist())) == [0.0, 0.5]


def test_a_pack_holds_its_samples_one_after_the_other() -> None:
    samples = [sample(number) for number in range(4)]
    batch = pack(samples, SPEC)
    assert batch.num_segments == 4 and batch.samples == tuple(s.key for s in samples)
    for name in ("video", "text"):
        for field in ("latents", "position", "role", "weight", "group"):
            pieces = split(getattr(batch.modalities[name], field), batch, name)
            for index, piece in enumerate(pieces):
                alone = pack([samples[index]], SPEC).modalities[name]
                assert torch.equal(piece, getattr(alone, field)), (name, field)
    for index, tokens in enumerate(split(batch.modalities["video"].latents, batch, "video")):
        latents = samples[index].latents["video"]
        assert torch.equal(unpatchify(tokens, patch_grid(latents.shape, PATCH), PATCH), latents)
    assert torch.equal(batch.conditions["text_pooled"][2], samples[2].conditions["text_pooled"])


def test_roles_weights_levels_and_layout() -> None:
    batch = pack([sample(0), sample(1)], SPEC)
    video, text = batch.modalities["video"], batch.modalities["text"]
    assert video.role.unique().tolist() == [Role.NOISED] and video.weight.unique().tolist() == [1]
    assert text.role.unique().tolist() == [Role.CLEAN] and text.weight.unique().tolist() == [0]
    assert text.position.abs().sum() == 0
    assert torch.equal(video.level, video.segment) and torch.equal(text.level, text.segment)
    assert batch.level_segment.tolist() == [0, 1] and batch.level_t.tolist() == [0, 0]
    tokens = [24 + 1, 1 + 2]
    assert batch.layout.lengths == tuple(tokens)
    assert batch.layout.visible == ((0,), (1,))
    assert batch.layout.num_pairs == tokens[0] ** 2 + tokens[1] ** 2


def test_levels_per_frame_have_a_row_for_each_patch_in_time() -> None:
    per_frame = replace(SPEC, levels_per="frame")
    batch = pack([sample(0), sample(2)], per_frame)
    assert batch.level_segment.tolist() == [0, 0, 0, 0, 1, 1]
    video, text = batch.modalities["video"], batch.modalities["text"]
    assert torch.equal(batch.level_segment[video.level], video.segment)
    times = (video.position[:, 0] / torch.tensor([0.25, 2.25])[video.segment]).round().long()
    assert torch.equal(video.level, torch.tensor([0, 4])[video.segment] + times)
    assert torch.equal(text.level, torch.tensor([0, 4])[text.segment])


@settings(deadline=None, max_examples=30)
@given(
    parts=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=4),
    levels_per=st.sampled_from(["segment", "frame"]),
)
def test_concatenating_packs_is_packing_all(parts: list[list[int]], levels_per: LevelsPer) -> None:
    spec = replace(SPEC, levels_per=levels_per)
    merged = concatenate([pack([sample(n) for n in part], spec) for part in parts])
    assert_equal(merged, pack([sample(n) for part in parts for n in part], spec))


def test_concatenating_keeps_who_sees_whom() -> None:
    batch = pack([sample(0)], SPEC)
    layout = replace(batch.layout, lengths=(1, 24), segments=(0, 0), visible=((0,), (0, 1)))
    # Text is a group of its own that does not see the video.
    causal = replace(
        batch,
        layout=layout,
        modalities={
            name: replace(tokens, group=tokens.group + (name == "video"))
            for name, tokens in batch.modalities.items()
        },
    )
    merged = concatenate([causal, causal])
    assert merged.layout.visible == ((0,), (0, 1), (2,), (2, 3))
    assert merged.layout.lengths == (1, 24, 1, 24)


def test_a_filler_is_empty_and_looks_like_the_others() -> None:
    empty, full = filler(SPEC), pack([sample(0)], SPEC)
    assert_equal(empty, pack([], SPEC))
    assert empty.num_segments == 0 and empty.num_tokens == 0 and empty.layout.num_pairs == 0
    for name, tokens in full.modalities.items():
        for field, values in vars(tokens).items():
            other: Tensor = getattr(empty.modalities[name], field)
            assert other.dtype == values.dtype and other.shape[1:] == values.shape[1:]
    assert empty.conditions["text_pooled"].shape == (0, 4)
    assert empty.level_segment.dtype == full.level_segment.dtype


def test_a_sample_without_a_modality_has_no_tokens_of_it() -> None:
    batch = pack([sample(0), sample(1, with_video=False), sample(2)], SPEC)
    video = batch.modalities["video"]
    assert video.segment.unique().tolist() == [0, 2]
    parts = split(video.latents, batch, "video")
    assert [len(part) for part in parts] == [24, 0, 16]
    assert pack([sample(1, with_video=False)], SPEC).modalities["video"].latents.shape == (0, 12)


def test_latents_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"4 x 4 x 6 .* patches of 1 x 3 x 2"):
        pack([sample(0)], PackSpec((StreamSpec("video", 3, (1, 3, 2)),)))
    with pytest.raises(ConfigError, match=r"'video' has 4 channels, but sample clips:0 .* to 3"):
        pack([sample(0)], PackSpec((StreamSpec("video", 4, PATCH),)))
    with pytest.raises(ConfigError, match="condition 'text_pooled' has 9 channels"):
        pack([sample(0)], replace(SPEC, conditions={"text_pooled": 9}))
