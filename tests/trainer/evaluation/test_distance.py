"""Distances of sets of vectors: closed forms, and nothing between samples of one law."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from kinodit.models.random import generator
from kinodit.trainer.evaluation.distance import (
    EvaluationError,
    Features,
    frechet,
    kernel_distance,
)


def draw(name: str, count: int, dim: int = 3) -> Features:
    return generator(name).standard_normal((count, dim))


def test_frechet_of_laws_that_are_known() -> None:
    a = draw("a", 40_000)
    b = draw("b", 40_000) * [1.0, 2.0, 3.0] + [1.0, 0.0, -2.0]
    # Diagonal covariances: |mu|^2 + sum (s - 1)^2.
    assert frechet(a, b) == pytest.approx(5 + 0 + 1 + 4, rel=0.02)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_the_formula_with_a_matrix_root() -> None:
    mix = draw("mix", 4, 4)
    a, b = draw("c", 50, 4), draw("d", 60, 4) @ mix + 0.3
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    # More features than samples: covariances without full rank.
    assert frechet(a[:3], b[:3]) > 0


def test_kernel_distance_is_unbiased() -> None:
    own = [kernel_distance(draw(f"x{k}", 20), draw(f"y{k}", 20)) for k in range(200)]
    error = np.std(own) / np.sqrt(len(own))
    assert abs(np.mean(own)) < 4 * error and min(own) < 0
    apart = [kernel_distance(draw(f"x{k}", 20), draw(f"y{k}", 20) + 1) for k in range(20)]
    assert np.mean(apart) > 20 * error


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    a, b = draw("p", 4), draw("q", 3)

    def k(x: Features, y: Features) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([k(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(3) for j in range(3) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_one_sample_is_too_few() -> None:
    for distance in (frechet, kernel_distance):
        with pytest.raises(EvaluationError, match="found 1 and 5: raise --samples"):
            distance(draw("a", 1), draw("b", 5))
