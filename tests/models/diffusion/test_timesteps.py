from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kinodit.models.diffusion.timesteps import (
    MODE_SCALE_RANGE,
    SHIFTS,
    TIMESTEPS,
    FixedShift,
    LevelLaw,
    LogitNormalTimesteps,
    ModeTimesteps,
    TimestepsConfig,
    TokenShift,
    UniformTimesteps,
    shift,
)
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, uniform

LAWS: list[TimestepsConfig] = [
    UniformTimesteps(),
    LogitNormalTimesteps(),
    LogitNormalTimesteps(mean=-0.7, std=1.6),
    ModeTimesteps(),
    ModeTimesteps(scale=MODE_SCALE_RANGE[0]),
    ModeTimesteps(scale=MODE_SCALE_RANGE[1]),
]


def grid(n: int = 200_000) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_levels_stay_within_noise_and_data_up_to_the_last_draw(law: TimestepsConfig) -> None:
    u = torch.tensor([0.0, 2.0**-53, 0.3, 1 - 2.0**-53], dtype=torch.float64)
    t = law.quantile(u)
    assert t.dtype == torch.float64
    assert bool(((t >= 0) & (t <= 1)).all())


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_law_is_monotonic_in_its_draw(law: TimestepsConfig) -> None:
    steps = law.quantile(grid(5000)).diff()
    assert bool((steps >= 0).all()) or bool((steps <= 0).all())


def test_uniform_moments() -> None:
    t = UniformTimesteps().quantile(grid())
    assert float(t.mean()) == pytest.approx(0.5)
    assert float(t.var(unbiased=False)) == pytest.approx(1 / 12, rel=1e-6)


def test_logit_normal_has_the_moments_it_names() -> None:
    z = torch.logit(LogitNormalTimesteps(mean=-0.7, std=1.6).quantile(grid()))
    assert float(z.mean()) == pytest.approx(-0.7, abs=1e-6)
    assert float(z.std(unbiased=False)) == pytest.approx(1.6, rel=1e-3)


def test_mode_prefers_the_middle_and_is_uniform_without_a_scale() -> None:
    u = grid(1000)
    torch.testing.assert_close(ModeTimesteps(scale=0.0).quantile(u), 1 - u)
    t = ModeTimesteps(scale=1.29).quantile(u)
    middle = ((t > 0.25) & (t < 0.75)).double().mean()
    ends = ModeTimesteps(scale=-1.0).quantile(u)
    assert middle > 0.55 > 0.5 > ((ends > 0.25) & (ends < 0.75)).double().mean()


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0, 17.0])
def test_shift_is_a_logit_offset(factor: float) -> None:
    t = grid(1000)
    torch.testing.assert_close(
        torch.logit(shift(t, factor)), torch.logit(t) + math.log(factor), rtol=1e-12, atol=1e-12
    )
    law = LogitNormalTimesteps(mean=-0.4, std=0.8)
    offset = LogitNormalTimesteps(mean=-0.4 + math.log(factor), std=0.8)
    torch.testing.assert_close(
        shift(law.quantile(t), factor), offset.quantile(t), rtol=1e-12, atol=1e-14
    )


def test_shifts_compose_and_keep_the_ends() -> None:
    t = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift(shift(t, 2.0), 1.5), shift(t, 3.0))
    assert shift(t, 3.0)[[0, 3]].tolist() == [0.0, 1.0]


def test_a_shift_above_one_means_more_noise_and_other_conventions_invert_it() -> None:
    t = grid(1000)
    assert shift(t, 3.0).mean() > t.mean() > shift(t, 1 / 3.0).mean()
    # A codebase with t = 1 for data that shifts by 0.3 means our 1 / 0.3.
    torch.testing.assert_close(1 - shift(1 - t, 0.3), shift(t, 1 / 0.3))


def test_more_tokens_mean_more_noise() -> None:
    law = LevelLaw(UniformTimesteps(), TokenShift(reference_tokens=256))
    u = torch.full((4,), 0.5, dtype=torch.float64)
    levels = law.levels(u, [64, 256, 1024, 0])
    torch.testing.assert_close(levels[:3], shift(u[:3], torch.tensor([0.5, 1.0, 2.0]).double()))
    assert 0 <= levels[3] < levels[0]
    fixed = LevelLaw(UniformTimesteps(), FixedShift(value=3.0)).levels(u, [64, 256, 1024, 0])
    assert fixed.tolist() == pytest.approx([0.75] * 4)


def test_keyed_draws_follow_the_law() -> None:
    u = torch.tensor([uniform(generator(0, index)) for index in range(4000)])
    z = torch.logit(LevelLaw(LogitNormalTimesteps(), FixedShift()).levels(u, [1] * 4000))
    assert float(z.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(4000))
    assert float(z.std()) == pytest.approx(1.0, abs=4 / math.sqrt(8000))


def test_tables_name_every_choice() -> None:
    for table in (TIMESTEPS, SHIFTS):
        for name, choice in table.items():
            default = {field.name: field.default for field in dataclasses.fields(choice)}["name"]
            assert default == name


@pytest.mark.parametrize(
    "build",
    [
        lambda: LogitNormalTimesteps(std=0.0),
        lambda: LogitNormalTimesteps(mean=math.nan),
        lambda: ModeTimesteps(scale=1.8),
        lambda: ModeTimesteps(scale=-1.1),
        lambda: FixedShift(value=0.0),
        lambda: TokenShift(reference_tokens=0),
    ],
)
def test_settings_outside_a_law_are_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ConfigError, match="got"):
        build()
