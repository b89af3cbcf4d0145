"""Rotary position embedding over (seconds, row, column), and the 2-D sine table of SD3.

RoPE: Su et al., "RoFormer" (arXiv 2104.09864), equation 34, per axis: the head dim is split over
the axes, and within an axis adjacent pairs (2j, 2j+1) turn by position * base^(-2j / d_axis).

Shape legend: N tokens, H heads, D head dim, P = D / 2 pairs, K rows of the noise-level table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.errors import ConfigError

Scaling = Literal["none", "pi", "ntk", "frequency_aware", "time_aware"]


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    axes:       head dims given to (time, row, column), each even, their sum the head dim. Empty:
                the split of Wan, 2 * (D // 6) for row and column and the rest for time.
    base:       b of the frequencies b^(-2j / d_axis)
    time_scale: units of the time axis per second. 6 makes one unit a latent frame of 24 fps video
                compressed 4 times; positions are in seconds so that all modalities share the axis.
    scaling:    what stretches frequencies when an axis is longer than it was in training
    factors:    L_test / L_train of each axis, at least 1; 1 leaves an axis alone
    trained:    L_train of each axis in its own units, for `frequency_aware` only
    """

    axes: tuple[int, ...] = ()
    base: float = 10000.0
    time_scale: float = 6.0
    scaling: Scaling = "none"
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    trained: tuple[float, float, float] = (128.0, 128.0, 128.0)

    def __post_init__(self) -> None:
        if self.axes and (len(self.axes) != 3 or any(dim < 0 or dim % 2 for dim in self.axes)):
            raise ConfigError(
                f"rope.axes = {self.axes}: three even numbers (time, row, column) are needed"
            )
        if min(self.factors) < 1:
            raise ConfigError(f"rope.factors = {self.factors}: each must be at least 1")

        if self.scaling == "frequency_aware" and min(self.trained) <= 2 * math.pi:
            raise ConfigError(
                f"rope.trained = {self.trained}: each must exceed 2 pi units, or no pair has a "
                "wavelength as short as the axis"
            )

    def split(self, head_dim: int) -> tuple[int, int, int]:
        """Head dims of (time, row, column) for heads of `head_dim`."""
        if self.axes:
            if sum(self.axes) != head_dim:
                raise ConfigError(
                    f"rope.axes = {self.axes} add up to {sum(self.axes)}, but the head dim is "
                    f"{head_dim}: change either so that they are equal"
                )
            return self.axes[0], self.axes[1], self.axes[2]
        space = 2 * (head_dim // 6)
        return head_dim - 2 * space, space, space


def axis_frequencies(
    dim: int,
    base: float,
    scaling: Scaling,
    factor: float,
    trained: float,
    level_t: Tensor,
) -> Tensor:
    """Angular frequencies of one axis, [K or 1, dim / 2], in the dtype of `level_t` ([K]).

    With s = `factor` and theta_j = b^(-2j / d):
    pi:              theta_j / s (Chen et al., arXiv 2306.15595)
    ntk:             base b s^(d / (d - 2)): the slowest pair is interpolated, the fastest is not
    frequency_aware: base b s^(d / d_target), d_target = d log_b(L_train / 2 pi), never below pi:
                     pairs with a wavelength above L_train are interpolated (Lumina-Next,
                     arXiv 2406.18583, section 2.2)
    time_aware:      base b s^(d / d_t), d_t = (d - 1)(1 - t) + 1, never below pi: pi at noise,
                     base b s at data (same paper, section 2.2; its t is our 1 - t)
    """
    pair = torch.arange(0, dim, 2, dtype=level_t.dtype, device=level_t.device) / max(dim, 1)
    pair = pair.unsqueeze(0)
    plain = base**-pair
    if scaling == "none" or factor == 1.0 or dim == 0:
        return plain
    interpolated = plain / factor
    if scaling == "pi":
        return interpolated
    if scaling == "ntk":
        # A single pair (d = 2) is fastest and slowest at once: the limit leaves it alone.
        return plain * factor ** (-pair * dim / max(dim - 2, 1))
    if scaling == "frequency_aware":
        target = dim * math.log(trained / (2 * math.pi)) / math.log(base)
        return torch.maximum(interpolated, plain * factor ** (-pair * dim / target))
    target_K1 = ((dim - 1) * (1 - level_t) + 1).unsqueeze(1)
    return torch.maximum(interpolated, plain * factor ** (-pair * dim / target_K1))


def rotary_table(
    config: RopeConfig,
    head_dim: int,
    position: Tensor,
    level: Tensor,
    level_t: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[N, P, 2] cosines and sines of the angles of tokens at `position` ([N, 3]: s, row, column).

    `level` ([N]) is each token's row of `level_t` ([K]), which only `time_aware` looks at.
    Computed in `dtype`, which should be float32 at least.
    """
    position_N3, level_t = position.to(dtype), level_t.to(dtype)
    units = (config.time_scale, 1.0, 1.0)
    angles = []
    for axis, dim in enumerate(config.split(head_dim)):
        frequency = axis_frequencies(
            dim, config.base, config.scaling, config.factors[axis], config.trained[axis], level_t
        )
        if frequency.shape[0] != 1:
            frequency = frequency.index_select(0, level)
        angles.append(position_N3.narrow(1, axis, 1) * units[axis] * frequency)
    angles_NP = torch.cat(angles, dim=-1)
    return torch.stack((angles_NP.cos(), angles_NP.sin()), dim=-1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """`x` [N, H, D] with every adjacent pair of channels turned by its token's angle.

    `rotary` is [N, P, 2], cosines and sines. Computed in its dtype, returned in that of `x`.
    """
    pairs_NHP2 = x.to(rotary.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        real, imaginary = pairs_NHP2.unbind(-1)
        cos, sin = rotary.unsqueeze(1).unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)
    else:
        # One pass in eager mode; a compiler has no code for complex numbers.
        turn = torch.view_as_complex(rotary).unsqueeze(1)
        turned = torch.view_as_real(torch.view_as_complex(pairs_NHP2) * turn)
    return turned.flatten(-2).to(x.dtype)


def sincos_2d(position: Tensor, width: int, scale: float, dtype: torch.dtype) -> Tensor:
    """[N, width] sine and cosine features of row and column, as in SD3's position table.

    The first half encodes the column, the second the row; each is [sin, cos] of the coordinate
    (times `scale`) at width / 4 frequencies 10000^(-4j / width) (He et al., arXiv 2111.06377,
    2-D sine-cosine embedding). `position` is [N, 3]: seconds, row, column.
    Computed in `dtype`.
    """
    quarter = width // 4
    omega = 10000.0 ** (
        -torch.arange(quarter, dtype=dtype, device=position.device) / max(quarter, 1)
    )
    features = []
    for axis in (2, 1):
        angle = position.narrow(1, axis, 1).to(dtype) * scale * omega
        features += [angle.sin(), angle.cos()]
    return torch.cat(features, dim=-1)
