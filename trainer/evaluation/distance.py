"""Distances between two sets of feature vectors. All in float64, on the host, in the given order.

Shape legend: n, m vectors of D features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinodit.models.errors import UserError

Features = NDArray[np.float64]


class EvaluationError(UserError):
    """Samples that nothing can be said of."""


def frechet(a: Features, b: Features) -> float:
    """Frechet distance of the normal laws with the means and covariances of `a` [n, D], `b` [m, D].

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al., arXiv 1706.08500, equation
    6): FID of features of pictures, FVD of clips, FAD of sounds. Raises EvaluationError for fewer
    than two vectors.
    """
    _require_two(a, b)
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(part, rowvar=False)) for part in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # (C_a C_b)^(1/2) has the trace of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
    product = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product).sum()
    return float(difference @ difference + max(trace, 0.0))


def kernel_distance(a: Features, b: Features) -> float:
    """Unbiased squared MMD of `a` [n, D] and `b` [m, D] with the kernel (x y / D + 1)^3.

    KID (Binkowski et al., arXiv 1801.01401, section 4), over all pairs instead of blocks of them:
    about 0 for two samples of one law, and at times below. Raises EvaluationError for fewer than
    two vectors.
    """
    _require_two(a, b)

    def kernel(x: Features, y: Features) -> Features:
        products: Features = (x @ y.T / x.shape[1] + 1) ** 3
        return products

    def within(x: Features) -> float:
        values, count = kernel(x, x), len(x)
        return float((values.sum() - np.trace(values)) / (count * (count - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def _require_two(a: Features, b: Features) -> None:
    if min(len(a), len(b)) < 2:
        raise EvaluationError(
            f"a distance needs at least two samples on each side, found {len(a)} and {len(b)}: "
            "raise --samples"
        )
