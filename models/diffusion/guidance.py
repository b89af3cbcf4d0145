"""Classifier-free guidance: a velocity under all conditions, and without some, become a guided one.

Ho and Salimans, "Classifier-free diffusion guidance", arXiv 2207.12598, equation 6, with the scale
w such that w = 1 is the plain conditional velocity. All channels are guided. With several
conditions, each that is taken away adds its own term, (w - 1) (c - u), to the velocity c under all.

Shape legend: N tokens of one modality, C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.diffusion import path
from kinodit.models.diffusion.samplers import VelocityFn
from kinodit.models.errors import ConfigError
from kinodit.models.tokens import Role, TokenBatch


@dataclass(frozen=True)
class GuidanceConfig:
    """Strength and extent of guidance.

    scale:      w of the text; 1 is no guidance, and then the unconditional pass is not run
    scales:     w of the text for streams that are named, where it is not `scale`
    conditions: stream -> w of what it tells the others, whether it is given or generated with them;
                1, as for those that are not named, runs no pass without it
    without:    how a stream is taken away in such a pass: it is absent, or pure noise (UniDiffuser,
                arXiv 2303.06555, section 3.3). What training had of the two
    rescale:    share of the guided quantity that is brought back to the conditional one's standard
                deviation (Lin et al., "Common diffusion noise schedules and sample steps are
                flawed", arXiv 2305.08891, equations 15 and 16); 0 is off
    rescale_on: whether that quantity is the velocity or the predicted data; the paper's is the
                network's output, and for rectified flow either is in use
    interval:   levels t at which guidance acts, both ends included; elsewhere the conditional
                velocity is used alone (Kynkaanniemi et al., arXiv 2404.07724)
    """

    scale: float = 4.5
    scales: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, float] = field(default_factory=dict)
    without: Literal["absent", "noise"] = "absent"
    rescale: float = 0.0
    rescale_on: Literal["velocity", "x0"] = "velocity"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for scale in (self.scale, *self.scales.values(), *self.conditions.values()):
            if not scale >= 0:
                raise ConfigError(f"guidance scale must not be negative, got {scale}")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance rescale lies in [0, 1], got {self.rescale}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"guidance interval lies in [0, 1] and rises, got {self.interval}")


TEXT = "text"
"""The condition that `scale` and `scales` are of: all text streams together."""


def scale_of(config: GuidanceConfig, condition: str, stream: str) -> float:
    """w of a condition (`TEXT`, or a stream) for a stream that is generated."""
    if condition == TEXT:
        return config.scales.get(stream, config.scale)
    return 1.0 if condition == stream else config.conditions.get(condition, 1.0)


def guiding(config: GuidanceConfig, streams: Iterable[str]) -> list[str]:
    """The conditions that a pass without is run for, if these streams are generated."""
    streams = list(streams)
    return [
        condition
        for condition in dict.fromkeys([TEXT, *config.conditions])
        if any(scale_of(config, condition, stream) != 1 for stream in streams)
    ]


def guided(
    conditional: VelocityFn,
    unconditional: VelocityFn | Mapping[str, VelocityFn],
    config: GuidanceConfig,
    batch: TokenBatch | None = None,
) -> VelocityFn:
    """The guided velocity, rescaled per sample: of one condition u + w (c - u).

    unconditional: the velocity without each condition that `guiding` names; one alone is without
                   text
    batch:         tells the samples of packed tokens [N, C] apart, and clean tokens from noised
                   ones; its latents are not read. Without it every tensor is one sample
    """
    passes = unconditional if isinstance(unconditional, Mapping) else {TEXT: unconditional}
    if not isinstance(unconditional, Mapping) and config.scale == 1 and not config.scales:
        return conditional
    if not passes:
        return conditional
    low, high = config.interval

    def velocity(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        c = conditional(x, t)
        if not low <= t <= high:
            return c
        without = {condition: one(x, t) for condition, one in passes.items()}
        out = {}
        for name in c:
            terms = [
                (scale_of(config, condition, name), u[name]) for condition, u in without.items()
            ]
            out[name] = _guided(c[name], [(scale, u) for scale, u in terms if scale != 1])
        if config.rescale == 0:
            return out
        return {name: _rescaled(c[name], out[name], x[name], t, config, batch, name) for name in c}

    return velocity


def _guided(c: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """c with the terms (w, u): u + w (c - u) of one, c + sum of (w - 1) (c - u) of several."""
    if len(terms) == 1:
        scale, u = terms[0]
        return u + scale * (c - u)
    out = c
    for scale, u in terms:
        out = out + (scale - 1) * (c - u)
    return out


def _rescaled(
    c: Tensor,
    g: Tensor,
    x: Tensor,
    t: float,
    config: GuidanceConfig,
    batch: TokenBatch | None,
    name: str,
) -> Tensor:
    """phi r + (1 - phi) g with r = g std(c) / std(g); on x0 where the config says so."""
    on_x0 = config.rescale_on == "x0" and t > 0
    c_like = path.x0_from_velocity(x, c, t) if on_x0 else c
    g_like = path.x0_from_velocity(x, g, t) if on_x0 else g
    ratio = _std(c_like, batch, name) / _std(g_like, batch, name).clamp(min=1e-12)
    changed = g_like * (config.rescale * ratio + (1 - config.rescale))
    return (x - changed) / t if on_x0 else changed


def _std(value: Tensor, batch: TokenBatch | None, name: str) -> Tensor:
    """Standard deviation over a sample's noised tokens and channels: [], or per token [N, 1]."""
    if batch is None:
        return value.std(unbiased=False)
    tokens = batch.modalities[name]
    weight_N1 = (tokens.role == Role.NOISED).to(value.dtype).unsqueeze(-1)

    def sample_mean(value_NC: Tensor) -> Tensor:
        sums_S2 = value_NC.new_zeros(batch.num_segments, 2)
        per_token_N1 = value_NC.mean(-1, keepdim=True) * weight_N1
        sums_S2.index_add_(0, tokens.segment, torch.cat([per_token_N1, weight_N1], dim=-1))
        return (sums_S2[:, :1] / sums_S2[:, 1:].clamp(min=1))[tokens.segment]

    return sample_mean((value - sample_mean(value)).square()).sqrt()
