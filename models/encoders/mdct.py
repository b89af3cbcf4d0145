"""A lossless audio codec without weights: the modified discrete cosine transform.

The MDCT with a sine window (Princen, Johnson and Bradley, "Subband/transform coding using filter
bank designs based on time domain aliasing cancellation", ICASSP 1987) is an orthonormal change of
basis whose frames overlap, so that errors of a latent do not click. It is computed in two steps
that are each orthonormal: samples that mirror each other at the border of two frames are rotated,
then every frame is taken to its DCT-IV. At both ends of a sound nothing is rotated. Together that
is, for a frame that begins at sample 0, sqrt(2 / H) sum_n w_n x_n cos(pi / H (n + 1/2) (k + 1/2))
over n from -H / 2 to 3 H / 2.

Shape legend: A sound channels, N samples, H samples of a frame (the hop), t frames.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.encoders.base import (
    AudioCodecConfig,
    SoundFormat,
    check_sound,
    check_sound_latents,
)
from kinodit.models.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MdctConfig(AudioCodecConfig):
    """The MDCT codec.

    hop:   samples, and coefficients, of a latent frame; even
    power: latents are sign(c) |c|^power of the coefficients c: below 1, quiet ones are heard by a
           loss too
    gain:  multiplies coefficients before that
    """

    name: Literal["mdct"] = "mdct"
    hop: int = 256
    power: float = 0.5
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.hop < 2 or self.hop % 2:
            raise ConfigError(f"the mdct codec needs an even hop of at least 2, got {self.hop}")
        if not 0.25 <= self.power <= 1:
            raise ConfigError(f"the mdct codec's power lies in [0.25, 1], got {self.power}")
        if not (self.gain > 0 and math.isfinite(self.gain)):
            raise ConfigError(f"the mdct codec's gain is above 0, got {self.gain}")

    def build(self, device: torch.device, sound: SoundFormat) -> MdctCodec:
        """The codec on `device`."""
        return MdctCodec(self, device, sound)


class MdctCodec:
    """The codec. Sound of 16 bits survives encode and decode exactly, latents being float32."""

    def __init__(self, config: MdctConfig, device: torch.device, sound: SoundFormat) -> None:
        self.config = config
        self.format = sound
        self.hop = config.hop
        self.latent_channels = sound.num_channels * config.hop
        # Layout of latents (version), then everything that changes a number.
        parts = ("mdct 1", config.hop, config.power, config.gain, *sound)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        # In float64, so that what float32 keeps does not depend on the order of sums.
        self._basis_HH = _dct4(config.hop).to(device)
        self._cos_h, self._sin_h = (part.to(device) for part in _rotation(config.hop))

    def encode(self, sound: Tensor) -> Tensor:
        """Float32 [A, N] to float32 [A H, N / H, 1, 1]; channels run over coefficients last."""
        check_sound(sound, self)
        frames_AtH = sound.to(self._basis_HH).unflatten(1, (-1, self.hop))
        coefficients_AtH = self._rotated(frames_AtH, 1.0) @ self._basis_HH * self.config.gain
        latents = coefficients_AtH.sign() * coefficients_AtH.abs() ** self.config.power
        return latents.transpose(1, 2).flatten(0, 1)[..., None, None].to(torch.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [A H, t, 1, 1] of any float dtype to float32 [A, t H]."""
        check_sound_latents(latents, self)
        latents_At = latents.to(self._basis_HH)[..., 0, 0].unflatten(0, (-1, self.hop))
        latents_AtH = latents_At.transpose(1, 2)
        coefficients_AtH = latents_AtH.sign() * latents_AtH.abs() ** (1 / self.config.power)
        # The DCT-IV is its own inverse.
        frames_AtH = self._rotated(coefficients_AtH / self.config.gain @ self._basis_HH, -1.0)
        return frames_AtH.flatten(1).clamp(-1, 1).to(torch.float32)

    def _rotated(self, frames: Tensor, way: float) -> Tensor:
        """Turns the mirrored pairs at every border of frames [A, t, H]; `way` -1 turns back."""
        half = self.hop // 2
        out = frames.clone()
        before, after = frames[:, :-1, half:].flip(-1), frames[:, 1:, :half]
        cos, sin = self._cos_h, self._sin_h * way
        # A DCT-IV goes on odd at its right border and even at its left one.
        out[:, :-1, half:] = (cos * before - sin * after).flip(-1)
        out[:, 1:, :half] = cos * after + sin * before
        return out


def _dct4(size: int) -> Tensor:
    """[size, size] float64, symmetric and orthonormal: sqrt(2 / n) cos(pi / n (i + ½)(j + ½))."""
    place = torch.arange(size, dtype=torch.float64) + 0.5
    return (torch.outer(place, place) * (math.pi / size)).cos() * math.sqrt(2 / size)


def _rotation(hop: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [H / 2] of the sine window's angle at each distance from a border."""
    distance = (2 * torch.arange(hop // 2, dtype=torch.float64) + 1) / hop
    angle = math.pi / 4 * (1 - distance)
    return angle.cos(), angle.sin()
