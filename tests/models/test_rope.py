"""Rotary positions: lengths stay, only differences count, and stretched axes behave as written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kinodit.models.errors import ConfigError
from kinodit.models.rope import (
    RopeConfig,
    Scaling,
    axis_frequencies,
    rotary_table,
    rotate,
    sincos_2d,
)

D = 24
SCALINGS: tuple[Scaling, ...] = ("none", "pi", "ntk", "frequency_aware", "time_aware")


def table(position: Tensor, config: RopeConfig, t: float = 0.4) -> Tensor:
    level = torch.zeros(position.shape[0], dtype=torch.int64)
    return rotary_table(config, D, position, level, torch.tensor([t]), torch.float64)


def frequencies(scaling: Scaling, factor: float, t: float, dim: int = 12) -> Tensor:
    level_t = torch.tensor([t], dtype=torch.float64)
    return axis_frequencies(dim, 10000.0, scaling, factor, 128.0, level_t)[0]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("axis", range(3))
def test_only_differences_count_and_norms_stay(scaling: Scaling, axis: int) -> None:
    config = RopeConfig(scaling=scaling, factors=(2.0, 3.0, 1.5))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 2, D, generator=generator, dtype=torch.float64)
    where = torch.randint(0, 9, (2, 5, 3), generator=generator).double()
    moved = where.clone()
    moved[..., axis] += 3.25

    def logits(position: Tensor) -> Tensor:
        q_turned, k_turned = (
            rotate(x, table(place, config)) for x, place in zip((q, k), position, strict=True)
        )
        torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
        return torch.einsum("qhd,khd->hqk", q_turned, k_turned)

    torch.testing.assert_close(logits(where), logits(moved), atol=1e-12, rtol=1e-12)
    other = where.clone()
    other[0, :, axis] += 3.25
    assert (logits(where) - logits(other)).abs().max() > 1e-2


def test_axes_turn_their_own_channels_only() -> None:
    config = RopeConfig(axes=(4, 8, 12))
    x = torch.ones(1, 1, D, dtype=torch.float64)
    for axis, (first, last) in enumerate([(0, 4), (4, 12), (12, 24)]):
        position = torch.zeros(1, 3)
        position[0, axis] = 1.3
        changed = (rotate(x, table(position, config)) - x).abs() > 1e-9
        assert changed.flatten().nonzero().flatten().tolist() == list(range(first, last))


def test_text_at_the_origin_is_not_turned() -> None:
    x = torch.randn(3, 2, D, dtype=torch.float64)
    assert torch.equal(rotate(x, table(torch.zeros(3, 3), RopeConfig())), x)


def test_time_is_in_seconds() -> None:
    config = RopeConfig(axes=(D, 0, 0), time_scale=6.0)
    one_second, six_units = torch.zeros(2, 1, 3)
    one_second[0, 0], six_units[0, 0] = 1, 6
    in_units = RopeConfig(axes=(D, 0, 0), time_scale=1.0)
    torch.testing.assert_close(table(one_second, config), table(six_units, in_units))


def test_the_default_split_is_wans() -> None:
    assert RopeConfig().split(128) == (44, 42, 42)
    assert RopeConfig().split(64) == (24, 20, 20)


def test_float32_tables_for_low_precision_heads() -> None:
    position = torch.tensor([[40.0, 200.0, 300.0]])
    level = torch.zeros(1, dtype=torch.int64)
    t = torch.zeros(1)
    exact = rotary_table(RopeConfig(), D, position, level, t, torch.float64)
    single = rotary_table(RopeConfig(), D, position, level, t, torch.float32)
    assert (exact - single).abs().max() < 1e-4
    x = torch.randn(1, 2, D)
    turned = rotate(x.bfloat16(), single)
    assert turned.dtype == torch.bfloat16
    # Two roundings to bf16, of the input and of the output; the angle keeps its precision.
    torch.testing.assert_close(turned.double(), rotate(x.double(), exact), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_scalings_are_what_their_papers_say(t: float) -> None:
    s, dim = 4.0, 12
    plain = frequencies("none", s, t)
    torch.testing.assert_close(frequencies("pi", s, t), plain / s)
    ntk = frequencies("ntk", s, t)
    # The base that the formula names, and its meaning: fastest pair kept, slowest interpolated.
    base = 10000.0 * s ** (dim / (dim - 2))
    torch.testing.assert_close(ntk, base ** (-torch.arange(0, dim, 2).double() / dim))
    torch.testing.assert_close(ntk[0], plain[0])
    torch.testing.assert_close(ntk[-1], plain[-1] / s)
    aware = frequencies("frequency_aware", s, t)
    assert bool((aware >= plain / s - 1e-15).all()) and bool((aware <= plain).all())
    too_slow = 2 * math.pi / plain > 128.0
    torch.testing.assert_close(aware[too_slow], plain[too_slow] / s)
    assert bool((aware[~too_slow] > plain[~too_slow] / s).all())


def test_time_aware_goes_from_interpolation_to_a_wider_base() -> None:
    s = 4.0
    plain = frequencies("none", s, 1.0)
    noise, data = frequencies("time_aware", s, 1.0), frequencies("time_aware", s, 0.0)
    torch.testing.assert_close(noise[1:], plain[1:] / s)
    torch.testing.assert_close(noise[0], plain[0])
    torch.testing.assert_close(data, (10000.0 * s) ** (-torch.arange(0, 12, 2).double() / 12))
    middle = frequencies("time_aware", s, 0.5)
    assert bool((middle >= noise - 1e-15).all()) and bool((middle <= data + 1e-15).all())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_factor_of_one_changes_nothing(scaling: Scaling) -> None:
    torch.testing.assert_close(frequencies(scaling, 1.0, 0.3), frequencies("none", 1.0, 0.3))


def test_time_aware_angles_differ_by_level() -> None:
    config = RopeConfig(scaling="time_aware", factors=(4.0, 4.0, 4.0))
    position = torch.full((2, 3), 5.0)
    level, level_t = torch.tensor([0, 1]), torch.tensor([0.1, 0.9])
    both = rotary_table(config, D, position, level, level_t, torch.float64)
    assert (both[0] - both[1]).abs().max() > 1e-2
    torch.testing.assert_close(both[1:], table(position[1:], config, t=0.9))


def test_sine_table_tells_rows_from_columns() -> None:
    position = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [7.0, 0.0, 2.0]])
    features = sincos_2d(position, 16, 0.5, torch.float64)
    torch.testing.assert_close(features[0, 8:], features[1, :8])
    torch.testing.assert_close(features[1], features[2])
    expected = [math.sin(1.0), math.cos(1.0)]
    torch.testing.assert_close(
        features[0, [8, 12]], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes": (4, 4)}, "three even numbers"),
        ({"axes": (3, 4, 5)}, "three even numbers"),
        ({"factors": (0.5, 1.0, 1.0)}, "each must be at least 1"),
        ({"scaling": "frequency_aware", "trained": (4.0, 64.0, 64.0)}, "exceed 2 pi"),
    ],
)
def test_bad_fields_are_config_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**fields)  # type: ignore[arg-type]
