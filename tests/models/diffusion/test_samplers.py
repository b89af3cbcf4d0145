from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from kinodit.models.diffusion.floor import gaussian_velocity
from kinodit.models.diffusion.samplers import Method, SamplerConfig, VelocityFn, sample, time_grid
from kinodit.models.diffusion.timesteps import shift
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal


def start(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"video": normal(generator("start"), shape).to(dtype)}


def field(function: object) -> VelocityFn:
    assert callable(function)
    return lambda x, t: {name: function(part, t) for name, part in x.items()}


def test_the_grid_runs_from_noise_to_data_and_crowds_towards_noise() -> None:
    plain, shifted = time_grid(4), time_grid(4, 3.0)
    assert plain.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert plain.dtype == torch.float64
    torch.testing.assert_close(shifted, shift(plain, 3.0))
    assert shifted[0] == 1 and shifted[-1] == 0 and bool((shifted[1:-1] > plain[1:-1]).all())


@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
def test_a_straight_path_is_exact_in_one_step(method: Method) -> None:
    x = start(3, 5)
    data = torch.full((3, 5), 0.25, dtype=torch.float64)
    out = sample(field(lambda part, t: x["video"] - data), x, time_grid(1), method)
    torch.testing.assert_close(out["video"], data)


def test_heun_is_exact_where_velocity_is_linear_in_t_and_euler_is_not() -> None:
    x = start(2, 2)
    times = torch.linspace(1.0, 0.5, 4, dtype=torch.float64)
    exact = x["video"] + (0.5**2 - 1.0) / 2 * 6
    heun = sample(field(lambda part, t: torch.full_like(part, 6 * t)), x, times, "heun")
    euler = sample(field(lambda part, t: torch.full_like(part, 6 * t)), x, times, "euler")
    torch.testing.assert_close(heun["video"], exact)
    assert (euler["video"] - exact).abs().max() > 0.1


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_a_linear_equation(method: Method, order: int) -> None:
    x = start(4, 4)
    errors = []
    for steps in (40, 80):
        times = torch.linspace(1.0, 0.2, steps + 1, dtype=torch.float64)
        out = sample(field(lambda part, t: -2.0 * part), x, times, method)["video"]
        errors.append(float((out - x["video"] * math.exp(1.6)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("method", "steps"), [("euler", 400), ("heun", 60)])
def test_the_perfect_velocity_of_gaussian_data_recovers_its_moments(
    method: Method, steps: int
) -> None:
    noise = start(200, 200)
    out = sample(
        field(lambda part, t: gaussian_velocity(part, t, std=0.4, mean=1.5)),
        noise,
        time_grid(steps),
        method,
    )["video"]
    # The exact flow maps quantiles onto quantiles.
    torch.testing.assert_close(out, 1.5 + 0.4 * noise["video"], rtol=0, atol=0.02)
    assert float(out.mean()) == pytest.approx(1.5, abs=0.01)
    assert float(out.std()) == pytest.approx(0.4, rel=0.02)


def test_heun_evaluates_twice_but_never_at_data() -> None:
    seen: list[float] = []

    def velocity(x: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
        seen.append(t)
        return dict(x)

    sample(velocity, start(1, 1), time_grid(3), "heun")
    assert seen == pytest.approx([1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3])
    seen.clear()
    sample(velocity, start(1, 1), time_grid(3), "euler")
    assert seen == pytest.approx([1.0, 2 / 3, 1 / 3])


def test_several_modalities_walk_together_and_the_start_is_kept() -> None:
    x = {"video": torch.ones(2, 3), "audio": torch.full((4, 1), 2.0)}
    out = sample(lambda state, t: {n: state[n] * 0 + 1 for n in state}, x, time_grid(2))
    assert out["video"].tolist() == [[0.0] * 3] * 2 and out["audio"].tolist() == [[1.0]] * 4
    assert x["video"].tolist() == [[1.0] * 3] * 2


def test_the_state_is_kept_in_float32_under_a_bfloat16_network() -> None:
    kinds: set[torch.dtype] = set()

    def velocity(x: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
        kinds.update(part.dtype for part in x.values())
        return {name: torch.full_like(part, -0.0625) for name, part in x.items()}

    # A step of 2^-10 would round away at 1 in bfloat16, and so would all 64 of them.
    x = {"video": torch.ones(1, 1, dtype=torch.bfloat16)}
    out = sample(velocity, x, time_grid(64))["video"]
    assert kinds == {torch.bfloat16} and out.dtype == torch.bfloat16
    assert float(out) == 1.0625


def test_no_step_and_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps=0"):
        SamplerConfig(steps=0)
    with pytest.raises(ConfigError, match="above 0"):
        SamplerConfig(shift=0.0)
    with pytest.raises(ValueError, match="unknown sampler 'rk4'"):
        sample(lambda x, t: x, start(1, 1), time_grid(1), "rk4")  # type: ignore[arg-type]


def test_the_multistep_method_is_of_second_order_with_one_evaluation_a_step() -> None:
    x = start(4, 4)
    calls: list[float] = []

    def velocity(part: Tensor, t: float) -> Tensor:
        calls.append(t)
        return gaussian_velocity(part, t, 2.0)

    def spread(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * 4 + t**2)

    errors: dict[str, list[float]] = {"euler": [], "dpmpp_2m": []}
    for method, found in errors.items():
        for steps in (40, 80):
            calls.clear()
            times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
            out = sample(field(velocity), x, times, method)["video"]  # type: ignore[arg-type]
            assert calls == times[:-1].tolist()
            found.append(float((out - x["video"] * spread(0.1) / spread(0.9)).abs().max()))
    orders = {method: math.log2(coarse / fine) for method, (coarse, fine) in errors.items()}
    assert orders == pytest.approx({"euler": 1.0, "dpmpp_2m": 2.0}, abs=0.2)
    assert errors["dpmpp_2m"][1] < errors["euler"][1] / 10


def test_the_multistep_method_is_euler_where_no_step_before_counts() -> None:
    x = start(4, 4)
    function = field(lambda part, t: torch.sin(3 * part) + t)
    for steps in (1, 2):
        euler, multistep = (
            sample(function, x, time_grid(steps, 3.0), method)["video"]
            for method in ("euler", "dpmpp_2m")
        )
        assert torch.equal(euler, multistep)
    still = sample(field(lambda part, t: 0 * part), x, time_grid(9), "dpmpp_2m")["video"]
    assert torch.equal(still, x["video"])
