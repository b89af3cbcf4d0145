"""What the network is trained for: corrupt a batch, read a prediction as velocity, measure it.

The trainer knows this protocol alone and never mentions noise. Shape legend: N tokens of one
modality, C channels, K rows of the table of levels, S segments, B bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kinodit.models.diffusion import path
from kinodit.models.diffusion.draws import (
    at_least_float32,
    drawn_levels,
    drawn_noise,
    noised_rows,
)
from kinodit.models.diffusion.timesteps import (
    LevelLaw,
    ShiftConfig,
    TimestepsConfig,
    default_shift,
    default_timesteps,
)
from kinodit.models.errors import ConfigError
from kinodit.models.random import sample_keys
from kinodit.models.tokens import Role, TokenBatch

Prediction = Literal["velocity", "x0"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What every objective has.

    condition_dropout: probability with which a sample is trained without its caption, so that the
                       model learns the unconditional velocity that guidance needs
    loss_weights:      lambda_m per modality; 1 for modalities that are not named
    validation_levels: noise levels at which the validation loss is measured
    """

    name: str
    condition_dropout: float = 0.1
    loss_weights: dict[str, float] = field(default_factory=dict)
    validation_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(f"condition_dropout is a probability, got {self.condition_dropout}")
        negative = {name: weight for name, weight in self.loss_weights.items() if weight < 0}
        if negative:
            raise ConfigError(f"loss_weights must not be negative, got {negative}")
        outside = [level for level in self.validation_levels if not 0 <= level <= 1]
        if outside:
            raise ConfigError(f"validation_levels lie in [0, 1], got {outside}")

    def loss_weight(self, modality: str) -> float:
        """lambda_m of a modality."""
        return self.loss_weights.get(modality, 1.0)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowConfig(ObjectiveConfig):
    """Rectified flow: straight paths, squared error of the velocity.

    prediction: what the network's output means. "auto" is x0 for modalities whose tokens have more
                channels than their stream is wide (velocity contains the noise, which does not fit
                through the network then), velocity for the others
    t_min:      below this level x0 is turned into velocity as if t were `t_min`
    """

    name: Literal["rectified_flow"] = "rectified_flow"
    prediction: Literal["auto", "velocity", "x0"] = "auto"
    timesteps: TimestepsConfig = field(default_factory=default_timesteps)
    shift: ShiftConfig = field(default_factory=default_shift)
    t_min: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.t_min < 1:
            raise ConfigError(f"t_min lies between 0 and 1, got {self.t_min}")


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {"rectified_flow": RectifiedFlowConfig}


class TokenShape(NamedTuple):
    """Channels of a modality's tokens, and the width of its stream."""

    channels: int
    width: int


@dataclass(frozen=True)
class NoisedBatch:
    """A batch as the network sees it, and what it was made of.

    batch: noised latents, levels filled in
    clean: name -> [N, C], the latents before corruption, as they came
    noise: name -> [N, C], at least float32; zero for samples of which no token is noised
    """

    batch: TokenBatch
    clean: Mapping[str, Tensor]
    noise: Mapping[str, Tensor]

    def to(self, device: torch.device) -> NoisedBatch:
        """The same on `device`."""
        return NoisedBatch(
            batch=self.batch.to(device),
            clean={name: x.to(device, non_blocking=True) for name, x in self.clean.items()},
            noise={name: e.to(device, non_blocking=True) for name, e in self.noise.items()},
        )

    def t(self, modality: str) -> Tensor:
        """The noise level of each token of a modality, [N]."""
        return self.batch.level_t[self.batch.modalities[modality].level]


class Objective(Protocol):
    """Corruption, the meaning of a prediction, and the error of one."""

    def corrupt(self, batch: TokenBatch, seed: int, level: float | None = None) -> NoisedBatch:
        """Noise the tokens whose role says so. `level` fixes t, for validation."""

    def velocity(self, prediction: Tensor, noised: NoisedBatch, modality: str) -> Tensor:
        """The velocity [N, C] that the network's output [N, C] means."""

    def errors(self, predictions: Mapping[str, Tensor], noised: NoisedBatch) -> dict[str, Tensor]:
        """Per token [N], unweighted: the mean over channels of the squared velocity error."""


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow (arXiv 2403.03206) on packed tokens.

    predictions: modality -> what its output means; `fallback` for modalities that are not named
    """

    law: LevelLaw
    fallback: Prediction
    predictions: Mapping[str, Prediction]
    t_min: float

    def corrupt(self, batch: TokenBatch, seed: int, level: float | None = None) -> NoisedBatch:
        """x_t = (1 - t) x + t e for noised tokens; clean tokens stay as they are.

        Draws are made on the host, keyed by sample, in float32 for all tokens of a sample's
        modality; the same in any pack, on any device and in any precision. A batch on an
        accelerator is waited for: corrupt on the host and move the result.

        Levels are drawn for the rows that have noised tokens; a row of clean tokens alone keeps
        the level that the batch gives it. With `level`, every drawn row has that level, and the
        noise of a sample is the same at all levels and at all steps, and the model draws nothing.
        """
        rows_K = noised_rows(batch)
        if level is None:
            level_t_K = drawn_levels(batch, rows_K, self.law, seed)
        else:
            level_t_K = torch.full_like(batch.level_t, level)
        level_t_K = torch.where(rows_K, level_t_K, batch.level_t)
        family = "noise" if level is None else "validation"
        noised: dict[str, Tensor] = {}
        noise: dict[str, Tensor] = {}
        for name, tokens in batch.modalities.items():
            e_NC = drawn_noise(tokens, batch.samples, seed, f"{family}/{name}", level is not None)
            t_N1 = level_t_K[tokens.level].to(e_NC.dtype).unsqueeze(-1)
            x_t_NC = path.interpolate(tokens.latents, e_NC, t_N1).to(tokens.latents.dtype)
            is_noised_N1 = (tokens.role == Role.NOISED).unsqueeze(-1)
            noised[name] = torch.where(is_noised_N1, x_t_NC, tokens.latents)
            noise[name] = e_NC
        clean = {name: tokens.latents for name, tokens in batch.modalities.items()}
        draws = sample_keys(seed, batch.samples, "model") if level is None else None
        seen = replace(batch.with_latents(noised), level_t=level_t_K, draws=draws)
        return NoisedBatch(batch=seen, clean=clean, noise=noise)

    def velocity(self, prediction: Tensor, noised: NoisedBatch, modality: str) -> Tensor:
        """Velocity [N, C], at least float32. Needs nothing of `noised` but its batch."""
        x_t_NC = noised.batch.modalities[modality].latents
        dtype = at_least_float32(prediction, x_t_NC)
        if self.predictions.get(modality, self.fallback) == "velocity":
            return prediction.to(dtype)
        t_N1 = noised.t(modality).to(dtype).unsqueeze(-1)
        return path.velocity_from_x0(x_t_NC.to(dtype), prediction.to(dtype), t_N1, self.t_min)

    def errors(self, predictions: Mapping[str, Tensor], noised: NoisedBatch) -> dict[str, Tensor]:
        """Per token [N], at least float32; zero for clean tokens."""
        errors = {}
        for name, prediction in predictions.items():
            target_NC = path.velocity(noised.clean[name], noised.noise[name])
            error_N = (self.velocity(prediction, noised, name) - target_NC).square().mean(-1)
            is_noised_N = noised.batch.modalities[name].role == Role.NOISED
            errors[name] = torch.where(is_noised_N, error_N, torch.zeros_like(error_N))
        return errors


def build_objective(
    config: ObjectiveConfig, shapes: Mapping[str, TokenShape] | None = None
) -> Objective:
    """The objective of a config; `shapes` of the predicted modalities decide prediction "auto".

    Raises ConfigError for an unknown objective, and for "auto" without shapes.
    """
    if not isinstance(config, RectifiedFlowConfig):
        raise ConfigError(f"unknown objective {config.name!r}; there are {sorted(OBJECTIVES)}")
    law = LevelLaw(config.timesteps, config.shift)
    if config.prediction != "auto":
        return RectifiedFlow(law, config.prediction, {}, config.t_min)
    if shapes is None:
        raise ConfigError(
            "objective.prediction is 'auto', which needs the token channels and stream widths of "
            "the model; set it to 'velocity' or 'x0'"
        )
    predictions = {name: resolve_prediction(shape) for name, shape in shapes.items()}
    return RectifiedFlow(law, "velocity", predictions, config.t_min)


def resolve_prediction(shape: TokenShape) -> Prediction:
    """x0 where a token has more channels than the stream is wide, else velocity."""
    return "x0" if shape.channels > shape.width else "velocity"


def at_level(batch: TokenBatch, t: float, rows_K: Tensor) -> TokenBatch:
    """The batch with level `t` in the rows of `noised_rows`: one evaluation of a sampler."""
    level = torch.full_like(batch.level_t, t)
    return replace(batch, level_t=torch.where(rows_K, level, batch.level_t))


def validation_batches(
    objective: Objective, batch: TokenBatch, seed: int, levels: tuple[float, ...]
) -> Iterator[tuple[float, NoisedBatch]]:
    """The batch at each fixed level, with the same noise whenever it is validated."""
    for level in levels:
        yield level, objective.corrupt(batch, seed, level)


def bin_errors(error_N: Tensor, t_N: Tensor, weight_N: Tensor, num_bins: int) -> Tensor:
    """Sums over `num_bins` equal bins of t: [B, 2] of (weight times error, weight).

    Additive over packs and ranks, and without a host sync.
    """
    index_N = (t_N * num_bins).long().clamp(0, num_bins - 1)
    pairs_N2 = torch.stack([weight_N * error_N.detach(), weight_N.to(error_N.dtype)], dim=-1)
    return error_N.new_zeros(num_bins, 2).index_add_(0, index_N, pairs_N2)
