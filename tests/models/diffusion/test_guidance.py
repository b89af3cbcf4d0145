from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from kinodit.models.diffusion.guidance import GuidanceConfig, guided, guiding
from kinodit.models.diffusion.samplers import VelocityFn, sample, time_grid
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal
from kinodit.models.tokens import Role
from tests.support.packs import Part, Sample, build_pack, noised

SHAPE = (12, 4)
X = {"video": normal(generator("x"), SHAPE)}
C = normal(generator("c"), SHAPE) * 2
U = normal(generator("u"), SHAPE)


class Constant:
    """A velocity that does not depend on x, and counts its calls."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.calls = 0

    def __call__(self, x: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
        self.calls += 1
        return {"video": self.value}


def result(t: float = 0.6, **settings: object) -> Tensor:
    velocity = guided(Constant(C), Constant(U), GuidanceConfig(**settings))  # type: ignore[arg-type]
    return velocity(X, t)["video"]


def test_guidance_is_linear_in_its_scale_and_in_all_channels() -> None:
    torch.testing.assert_close(result(scale=0.0), U)
    torch.testing.assert_close(result(scale=4.0), U + 4.0 * (C - U))
    torch.testing.assert_close((result(scale=2.0) + result(scale=6.0)) / 2, result(scale=4.0))


def test_scale_one_is_the_conditional_velocity_itself_in_one_pass() -> None:
    conditional, unconditional = Constant(C), Constant(U)
    config = GuidanceConfig(scale=1.0, rescale=0.7)
    velocity = guided(conditional, unconditional, config)
    assert velocity(X, 0.5)["video"] is C
    sample(velocity, X, time_grid(3))
    assert unconditional.calls == 0 and conditional.calls == 4


def test_outside_the_interval_there_is_one_pass() -> None:
    unconditional = Constant(U)
    velocity = guided(Constant(C), unconditional, GuidanceConfig(interval=(0.2, 0.7)))
    for t in (0.0, 0.19, 0.71, 1.0):
        assert velocity(X, t)["video"] is C
    assert unconditional.calls == 0
    for t in (0.2, 0.5, 0.7):
        torch.testing.assert_close(velocity(X, t)["video"], U + 4.5 * (C - U))
    assert unconditional.calls == 3


@pytest.mark.parametrize("on", ["velocity", "x0"])
def test_rescaling_brings_the_deviation_back(on: str) -> None:
    t = 0.6

    def quantity(velocity: Tensor) -> Tensor:
        return velocity if on == "velocity" else X["video"] - t * velocity

    plain = result(scale=6.0)
    full = result(scale=6.0, rescale=1.0, rescale_on=on)
    part = result(scale=6.0, rescale=0.75, rescale_on=on)
    torch.testing.assert_close(quantity(full).std(unbiased=False), quantity(C).std(unbiased=False))
    torch.testing.assert_close(part, 0.75 * full + 0.25 * plain, rtol=1e-4, atol=1e-5)
    ratio = quantity(full) / quantity(plain)
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_rescaling_x0_at_data_is_finite() -> None:
    out = result(t=0.0, rescale=0.5, rescale_on="x0")
    assert bool(torch.isfinite(out).all())


def test_packed_samples_are_rescaled_each_by_itself_and_by_noised_tokens_alone() -> None:
    first = Part([Role.CLEAN] * 2 + [Role.NOISED] * 4)
    batch = build_pack(
        [Sample("a", {"video": first}), Sample("b", {"video": noised(6)})], {"video": 4}
    )
    config = GuidanceConfig(scale=3.0, rescale=0.8)
    spoiled_c, spoiled_u = C.clone(), U.clone()
    spoiled_c[:2], spoiled_u[:2] = 1e4, -1e4
    packed = guided(Constant(spoiled_c), Constant(spoiled_u), config, batch)(X, 0.5)["video"]
    for part in (slice(2, 6), slice(6, 12)):
        alone = guided(Constant(C[part]), Constant(U[part]), config)
        x = {"video": X["video"][part]}
        torch.testing.assert_close(packed[part], alone(x, 0.5)["video"], rtol=1e-4, atol=1e-5)


def test_guidance_of_float64_and_of_no_tokens() -> None:
    empty = build_pack([], {"video": 4})
    none: VelocityFn = Constant(torch.zeros(0, 4))
    config = GuidanceConfig(rescale=0.5)
    assert guided(none, none, config, empty)({"video": torch.zeros(0, 4)}, 0.5)["video"].shape == (
        0,
        4,
    )
    double = guided(Constant(C.double()), Constant(U.double()), config)
    assert double({"video": X["video"].double()}, 0.5)["video"].dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [{"scale": -1.0}, {"rescale": 1.1}, {"interval": (0.7, 0.2)}, {"interval": (0.0, 1.2)}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="guidance"):
        GuidanceConfig(**wrong)  # type: ignore[arg-type]


def counted(value: Tensor, calls: list[str], name: str) -> VelocityFn:
    def velocity(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        calls.append(name)
        return {stream: value * (1 + index) for index, stream in enumerate(x)}

    return velocity


def test_streams_have_scales_of_their_own_and_conditions_add_up() -> None:
    config = GuidanceConfig(
        scale=3.0, scales={"audio": 1.0}, conditions={"audio": 2.0, "video": 1.5}
    )
    assert guiding(config, ["video", "audio"]) == ["text", "audio", "video"]
    c, without_text, without_audio = (torch.full((2, 4), v) for v in (1.0, 0.5, 0.25))
    passes = {"text": without_text, "audio": without_audio, "video": without_audio}
    calls: list[str] = []
    fields = {name: counted(value, calls, name) for name, value in passes.items()}
    x = {"video": torch.zeros(2, 4), "audio": torch.zeros(2, 4)}
    out = guided(counted(c, calls, "all"), fields, config)(x, 0.5)
    assert calls == ["all", "text", "audio", "video"]
    # Video: 1 + (3 - 1)(1 - 0.5) + (2 - 1)(1 - 0.25); audio, twice the values: text is not guided.
    assert torch.equal(out["video"], torch.full((2, 4), 2.75))
    assert torch.equal(out["audio"], torch.full((2, 4), 2.0 * (1 + 0.5 * 0.75)))


def test_a_scale_of_one_runs_no_pass() -> None:
    ones = GuidanceConfig(scale=1.0, conditions={"audio": 1.0, "video": 1.0})
    assert guiding(ones, ["video", "audio"]) == []
    plain = Constant(C)
    assert guided(plain, {}, ones) is plain
    # What a stream is to itself needs no pass, and text none where every generated stream has 1.
    assert guiding(GuidanceConfig(scale=1.0, conditions={"video": 2.0}), ["video"]) == []
    assert guiding(GuidanceConfig(scale=4.0, scales={"video": 1.0}), ["video"]) == []
    assert guiding(GuidanceConfig(scale=4.0), ["video"]) == ["text"]


def test_one_condition_as_a_mapping_is_the_same_to_the_bit() -> None:
    config = GuidanceConfig(scale=3.7)
    one = guided(Constant(C), Constant(U), config)(X, 0.5)
    same = guided(Constant(C), {"text": Constant(U)}, config)(X, 0.5)
    assert torch.equal(one["video"], same["video"])
