"""Corruption, keyed draws, and the meaning of a prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinodit.models.diffusion import path
from kinodit.models.diffusion.draws import noised_rows
from kinodit.models.diffusion.objective import (
    ObjectiveConfig,
    RectifiedFlowConfig,
    TokenShape,
    at_level,
    bin_errors,
    build_objective,
    resolve_prediction,
    validation_batches,
)
from kinodit.models.diffusion.timesteps import TokenShift, UniformTimesteps, shift
from kinodit.models.errors import ConfigError
from kinodit.models.random import normal, sample_generator, uniform
from kinodit.models.tokens import Role, TokenBatch
from tests.support.packs import Part, Sample, build_pack, clean, noised

CHANNELS = {"text": 3, "video": 5}
SEED = 11
VELOCITY = build_objective(RectifiedFlowConfig(prediction="velocity"))
X0 = build_objective(RectifiedFlowConfig(prediction="x0"))


def samples(count: int) -> list[Sample]:
    return [
        Sample(f"set:{index}", {"video": noised(4 + index), "text": clean(1 + index)})
        for index in range(count)
    ]


def pack(count: int = 3, dtype: torch.dtype = torch.float32, step: int = 0) -> TokenBatch:
    return build_pack(samples(count), CHANNELS, step, dtype)


def alone(batch: TokenBatch, count: int, index: int) -> TokenBatch:
    """Sample `index` of `pack(count)` in a pack of its own, under the same key."""
    single = build_pack([samples(count)[index]], CHANNELS)
    return replace(single, samples=(batch.samples[index],))


def test_t_is_noise_at_one_and_data_at_zero() -> None:
    batch = pack()
    x = batch.modalities["video"].latents
    at_noise, at_data = (VELOCITY.corrupt(batch, SEED, level) for level in (1.0, 0.0))
    assert torch.equal(at_noise.batch.modalities["video"].latents, at_noise.noise["video"])
    assert torch.equal(at_data.batch.modalities["video"].latents, x)
    half = VELOCITY.corrupt(batch, SEED, 0.5)
    torch.testing.assert_close(
        half.batch.modalities["video"].latents, (x + half.noise["video"]) / 2
    )


def test_the_path_can_be_walked_both_ways() -> None:
    noised_batch = VELOCITY.corrupt(pack(dtype=torch.float64), SEED)
    tokens = noised_batch.batch.modalities["video"]
    t = noised_batch.t("video").double().unsqueeze(-1)
    x, e = noised_batch.clean["video"], noised_batch.noise["video"]
    v = path.velocity(x, e)
    torch.testing.assert_close(path.x0_from_velocity(tokens.latents, v, t), x)
    torch.testing.assert_close(path.noise_from_velocity(tokens.latents, v, t), e)
    torch.testing.assert_close(path.velocity_from_x0(tokens.latents, x, t, 1e-6), v)


def test_clean_tokens_and_the_input_stay_as_they_are() -> None:
    batch = pack()
    before = {name: tokens.latents.clone() for name, tokens in batch.modalities.items()}
    out = VELOCITY.corrupt(batch, SEED)
    assert torch.equal(out.batch.modalities["text"].latents, before["text"])
    assert torch.equal(batch.modalities["video"].latents, before["video"])
    assert not torch.equal(out.batch.modalities["video"].latents, before["video"])
    assert torch.equal(out.clean["video"], before["video"])


def test_text_shares_the_level_of_its_sample() -> None:
    out = VELOCITY.corrupt(pack(), SEED)
    assert torch.equal(out.t("text"), out.batch.level_t[out.batch.modalities["text"].segment])


def test_draws_are_the_keyed_ones() -> None:
    batch = pack(step=7)
    out = VELOCITY.corrupt(batch, SEED)
    key = batch.samples[1]
    expected = normal(sample_generator(SEED, key, "noise/video"), (5, 5))
    assert torch.equal(out.noise["video"][4:9], expected)
    u = torch.tensor(uniform(sample_generator(SEED, key, "timestep")), dtype=torch.float64)
    t = torch.sigmoid(torch.special.ndtri(u))
    assert out.batch.level_t[1] == t.to(torch.float32)


def test_noise_and_level_do_not_depend_on_the_pack() -> None:
    batch = pack(3)
    out = VELOCITY.corrupt(batch, SEED)
    start = 0
    for index in range(3):
        single = VELOCITY.corrupt(alone(batch, 3, index), SEED)
        length = single.noise["video"].shape[0]
        assert torch.equal(single.noise["video"], out.noise["video"][start : start + length])
        assert torch.equal(single.batch.level_t, out.batch.level_t[index : index + 1])
        assert torch.equal(
            single.batch.modalities["video"].latents,
            out.batch.modalities["video"].latents[start : start + length],
        )
        start += length


def test_seed_step_slot_and_sample_each_change_the_draws() -> None:
    batch = pack(1)
    key = batch.samples[0]
    keys = [key, replace(key, step=1), replace(key, slot=5), replace(key, sample="set:9")]
    seen = [VELOCITY.corrupt(replace(batch, samples=(one,)), SEED) for one in keys]
    seen.append(VELOCITY.corrupt(batch, SEED + 1))
    assert len({float(out.batch.level_t[0]) for out in seen}) == 5
    assert len({float(out.noise["video"][0, 0]) for out in seen}) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_precision_sees_the_same_draws(dtype: torch.dtype) -> None:
    single = VELOCITY.corrupt(pack(), SEED)
    other = VELOCITY.corrupt(pack(dtype=dtype), SEED)
    assert torch.equal(other.batch.level_t, single.batch.level_t)
    assert torch.equal(other.noise["video"].float(), single.noise["video"])
    assert other.batch.modalities["video"].latents.dtype == dtype
    assert other.noise["video"].dtype == torch.promote_types(dtype, torch.float32)


def test_float64_batches_stay_float64() -> None:
    batch = pack(dtype=torch.float64)
    batch = replace(batch, level_t=batch.level_t.double())
    for objective in (VELOCITY, X0):
        out = objective.corrupt(batch, SEED)
        prediction = torch.zeros(15, 5, dtype=torch.float64, requires_grad=True)
        assert out.batch.level_t.dtype == torch.float64
        # The same numbers as a float32 run has, so that proofs are about that run.
        single = objective.corrupt(pack(), SEED)
        assert torch.equal(out.batch.level_t, single.batch.level_t.double())
        assert torch.equal(out.noise["video"], single.noise["video"].double())
        assert out.batch.modalities["video"].latents.dtype == torch.float64
        assert objective.velocity(prediction, out, "video").dtype == torch.float64
        assert objective.errors({"video": prediction}, out)["video"].dtype == torch.float64


def test_samples_without_noised_tokens_draw_nothing() -> None:
    frozen = Sample("set:0", {"video": clean(3), "text": clean(2)}, level_t=(0.25,))
    batch = build_pack([frozen, *samples(2)[1:]], CHANNELS)
    assert noised_rows(batch).tolist() == [False, True]
    out = VELOCITY.corrupt(batch, SEED)
    assert out.batch.level_t[0] == 0.25
    assert bool((out.noise["video"][:3] == 0).all())
    assert torch.equal(out.batch.modalities["video"].latents[:3], out.clean["video"][:3])
    fixed = VELOCITY.corrupt(batch, SEED, 0.75)
    assert fixed.batch.level_t.tolist() == [0.25, 0.75]


def test_every_frame_may_have_a_level_of_its_own() -> None:
    frames = [0, 0, 1, 1, 2, 2]
    rows = Part([Role.NOISED] * 6, levels=frames)
    one = Sample("set:0", {"video": rows, "text": clean(2)}, level_t=(0.0, 0.0, 0.0))
    batch = build_pack([one, samples(2)[1]], CHANNELS)
    out = VELOCITY.corrupt(batch, SEED)
    assert len(set(out.t("video")[:6].tolist())) == 3
    for row in range(3):
        draw = uniform(sample_generator(SEED, batch.samples[0], f"timestep/{row}"))
        t = torch.sigmoid(torch.special.ndtri(torch.tensor(draw, dtype=torch.float64)))
        assert out.batch.level_t[row] == t.to(torch.float32)
    e, x = out.noise["video"], out.clean["video"]
    t = out.t("video").unsqueeze(-1)
    torch.testing.assert_close(out.batch.modalities["video"].latents, (1 - t) * x + t * e)
    assert VELOCITY.corrupt(batch, SEED, 0.5).batch.level_t.tolist() == [0.5] * 4


def test_a_clean_first_frame_keeps_its_level_and_leaves_the_clip_its_draw() -> None:
    roles = [Role.CLEAN, Role.CLEAN, Role.NOISED, Role.NOISED]
    first = Part(roles, levels=[1, 1, 0, 0])
    conditioned = Sample("set:0", {"video": first, "text": clean(1)}, level_t=(0.5, 0.0))
    plain = Sample("set:0", {"video": noised(4), "text": clean(1)})
    out = VELOCITY.corrupt(build_pack([conditioned], CHANNELS), SEED)
    reference = VELOCITY.corrupt(build_pack([plain], CHANNELS), SEED)
    assert out.batch.level_t.tolist() == [reference.batch.level_t[0].item(), 0.0]
    seen = out.batch.modalities["video"].latents
    assert torch.equal(seen[:2], out.clean["video"][:2])
    assert torch.equal(seen[2:], reference.batch.modalities["video"].latents[2:])
    errors = VELOCITY.errors({"video": torch.zeros(4, 5)}, out)["video"]
    assert errors[:2].tolist() == [0.0, 0.0] and bool((errors[2:] > 0).all())


def test_the_shift_follows_the_noised_tokens_of_a_sample() -> None:
    config = RectifiedFlowConfig(
        prediction="velocity", timesteps=UniformTimesteps(), shift=TokenShift(reference_tokens=4)
    )
    both = Sample(
        "set:0", {"video": Part([Role.NOISED] * 12 + [Role.CLEAN] * 3), "text": noised(4)}
    )
    batch = build_pack([both, samples(2)[1]], CHANNELS)
    out = build_objective(config).corrupt(batch, SEED)
    for index, tokens in enumerate((16, 5)):
        u = uniform(sample_generator(SEED, batch.samples[index], "timestep"))
        t = shift(torch.tensor(u, dtype=torch.float64), (tokens / 4) ** 0.5)
        assert out.batch.level_t[index] == t.to(torch.float32)


def test_modalities_share_the_level_but_not_the_noise() -> None:
    joint = Sample("set:0", {"video": noised(4), "audio": noised(4)})
    out = VELOCITY.corrupt(build_pack([joint], {"video": 5, "audio": 5}), SEED)
    assert torch.equal(out.t("video"), out.t("audio"))
    assert not torch.equal(out.noise["video"], out.noise["audio"])


@pytest.mark.parametrize("count", [0, 2])
def test_empty_packs_and_empty_modalities_go_through(count: int) -> None:
    texts = [Sample(f"set:{index}", {"text": clean(2)}) for index in range(count)]
    batch = build_pack(texts, CHANNELS)
    prediction = torch.zeros(0, 5, requires_grad=True)
    for level in (None, 0.5):
        out = X0.corrupt(batch, SEED, level)
        errors = X0.errors({"video": prediction}, out)["video"]
        assert errors.shape == (0,) and errors.requires_grad


def test_the_perfect_prediction_has_no_error_whatever_it_means() -> None:
    batch = pack(dtype=torch.float64)
    out = VELOCITY.corrupt(batch, SEED)
    perfect = {"video": out.noise["video"] - out.clean["video"]}
    assert float(VELOCITY.errors(perfect, out)["video"].max()) == 0.0
    assert bool((out.batch.level_t > 0.05).all())
    assert float(X0.errors(dict(out.clean), out)["video"].max()) < 1e-20


def test_errors_are_squared_velocity_errors_per_token() -> None:
    out = VELOCITY.corrupt(pack(), SEED)
    prediction = torch.randn(15, 5, generator=torch.Generator().manual_seed(0))
    target = out.noise["video"] - out.clean["video"]
    expected = ((prediction - target) ** 2).mean(-1)
    torch.testing.assert_close(VELOCITY.errors({"video": prediction}, out)["video"], expected)
    t = out.t("video").unsqueeze(-1)
    as_velocity = (out.batch.modalities["video"].latents - prediction) / t.clamp(min=0.05)
    torch.testing.assert_close(X0.velocity(prediction, out, "video"), as_velocity)
    torch.testing.assert_close(
        X0.errors({"video": prediction}, out)["video"], ((as_velocity - target) ** 2).mean(-1)
    )


def test_below_t_min_a_predicted_x0_stays_finite_and_every_velocity_in_reach() -> None:
    out = X0.corrupt(pack(dtype=torch.float64), SEED, 0.0)
    wanted = out.noise["video"] - out.clean["video"]
    prediction = out.batch.modalities["video"].latents - 0.05 * wanted
    torch.testing.assert_close(X0.velocity(prediction, out, "video"), wanted)


def test_auto_takes_x0_where_tokens_have_more_channels_than_the_stream_is_wide() -> None:
    assert resolve_prediction(TokenShape(channels=384, width=192)) == "x0"
    assert resolve_prediction(TokenShape(channels=64, width=64)) == "velocity"
    shapes = {"video": TokenShape(384, 192), "audio": TokenShape(8, 192)}
    objective = build_objective(RectifiedFlowConfig(), shapes)
    joint = Sample("set:0", {"video": noised(4), "audio": noised(4)})
    out = objective.corrupt(build_pack([joint], {"video": 5, "audio": 5}), SEED)
    prediction = torch.ones(4, 5)
    assert torch.equal(objective.velocity(prediction, out, "audio"), prediction)
    assert torch.equal(
        objective.velocity(prediction, out, "video"), X0.velocity(prediction, out, "video")
    )
    with pytest.raises(ConfigError, match="'auto', which needs the token channels"):
        build_objective(RectifiedFlowConfig())


def test_validation_has_the_same_noise_at_every_level_and_step() -> None:
    levels = (0.1, 0.5, 0.9)
    early = list(validation_batches(VELOCITY, pack(step=0), SEED, levels))
    late = list(validation_batches(VELOCITY, pack(step=900), SEED, levels))
    training = VELOCITY.corrupt(pack(step=0), SEED)
    for (level, one), (_, other) in zip(early, late, strict=True):
        assert torch.equal(one.noise["video"], early[0][1].noise["video"])
        assert torch.equal(one.noise["video"], other.noise["video"])
        assert one.batch.level_t.tolist() == pytest.approx([level] * 3)
        assert not torch.equal(one.noise["video"], training.noise["video"])
    assert [level for level, _ in early] == list(levels)


def test_at_level_moves_noised_rows_alone() -> None:
    frozen = Sample("set:0", {"video": clean(3)}, level_t=(0.25,))
    batch = build_pack([frozen, *samples(2)[1:]], CHANNELS)
    assert at_level(batch, 0.6, noised_rows(batch)).level_t.tolist() == pytest.approx([0.25, 0.6])


def test_errors_fall_into_bins_of_t() -> None:
    t = torch.tensor([0.0, 0.1, 0.3, 0.99, 1.0])
    error = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0], requires_grad=True)
    weight = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0])
    table = bin_errors(error, t, weight, 4)
    assert table.tolist() == [[4.0, 2.0], [10.0, 2.0], [0.0, 0.0], [7.0, 1.0]]
    assert not table.requires_grad


@pytest.mark.parametrize(
    "settings",
    [
        {"condition_dropout": 1.5},
        {"loss_weights": {"video": -1.0}},
        {"validation_levels": (0.5, 1.5)},
        {"t_min": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RectifiedFlowConfig(**settings)  # type: ignore[arg-type]


def test_loss_weights_default_to_one_and_unknown_objectives_are_refused() -> None:
    config = RectifiedFlowConfig(loss_weights={"audio": 0.5})
    assert (config.loss_weight("audio"), config.loss_weight("video")) == (0.5, 1.0)
    with pytest.raises(ConfigError, match="unknown objective 'mine'"):
        build_objective(ObjectiveConfig(name="mine"))


def test_moving_moves_everything() -> None:
    out = VELOCITY.corrupt(pack(), SEED).to(torch.device("meta"))
    moved: list[Tensor] = [*out.clean.values(), *out.noise.values(), out.batch.level_t]
    assert {tensor.device.type for tensor in moved} == {"meta"}
