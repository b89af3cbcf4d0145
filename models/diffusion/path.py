"""The straight path from data to noise, and the ways to name a point on it.

Convention: t = 1 is noise, t = 0 is data. Shape legend: N tokens, C channels; t is a number or
broadcasts against [N, C].

Liu, Gong and Liu, "Flow straight and fast", ICLR 2023 (arXiv 2209.03003), equation 1; in this
convention Esser et al., "Scaling rectified flow transformers", ICML 2024 (arXiv 2403.03206),
equation 13.
"""

from __future__ import annotations

from torch import Tensor


def interpolate(x_NC: Tensor, noise_NC: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x + t e, [N, C]."""
    return (1 - t) * x_NC + t * noise_NC


def velocity(x_NC: Tensor, noise_NC: Tensor) -> Tensor:
    """dx_t / dt = e - x, [N, C]: constant along the path."""
    return noise_NC - x_NC


def x0_from_velocity(x_t_NC: Tensor, velocity_NC: Tensor, t: Tensor | float) -> Tensor:
    """x = x_t - t v, [N, C]."""
    return x_t_NC - t * velocity_NC


def noise_from_velocity(x_t_NC: Tensor, velocity_NC: Tensor, t: Tensor | float) -> Tensor:
    """e = x_t + (1 - t) v, [N, C]."""
    return x_t_NC + (1 - t) * velocity_NC


def velocity_from_x0(x_t_NC: Tensor, x0_NC: Tensor, t: Tensor, t_min: float) -> Tensor:
    """v = (x_t - x0) / max(t, t_min), [N, C].

    Below `t_min` the division would turn rounding into velocity (Li and He, "Back to basics: let
    denoising generative models denoise", arXiv 2511.13720, section 4: 0.05). The map from x0 to v
    stays one to one there, so that the best velocity is still within the network's reach.
    """
    return (x_t_NC - x0_NC) / t.clamp(min=t_min)
