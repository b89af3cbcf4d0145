"""A mel spectrogram as an audio codec: small and easy to learn, at the price of the phase.

Levels in dB of triangular bands on the mel scale (O'Shaughnessy's formula, as in HTK). Back to
sound, the powers of frequencies are non-negative ones that give these bands (multiplicative updates
of the divergence, equation 5 of Lee and Seung, "Algorithms for non-negative matrix factorization",
NIPS 2000), and phases are found by fast Griffin-Lim (Perraudin, Balazs and Sondergaard, WASPAA
2013) from keyed noise.

Shape legend: A sound channels, N samples, t frames, W samples of a window, F = W / 2 + 1
frequencies, M mel bands.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.encoders.base import (
    AudioCodecConfig,
    EncoderError,
    SoundFormat,
    check_sound,
    check_sound_latents,
)
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal

UPDATES = 40
"""Multiplicative updates from bands to powers; more change nothing that can be heard."""
MOMENTUM = 0.99
"""alpha of fast Griffin-Lim, the paper's best."""


@dataclass(frozen=True, kw_only=True)
class MelConfig(AudioCodecConfig):
    """The mel codec.

    hop:        samples from one latent frame to the next
    window:     samples that a frame looks at, around its own; even, at least 2 hops
    num_bands:  mel bands: latent channels of each sound channel
    min_hz:     lower end of the lowest band
    max_hz:     upper end of the highest band; 0 is half the rate
    floor_db:   what is quieter, against a sine of full scale, counts as silence. Levels lie in
                -1 (silence) to 1 (full scale)
    rounds:     of Griffin-Lim, when sound is made
    mean, std:  of a dataset's levels: latents are (level - mean) / std. Where sound is rare, levels
                are nearly constant; a network that is given sound then hardly hears it beside
                noise, whose deviation is 1
    """

    name: Literal["mel"] = "mel"
    hop: int = 256
    window: int = 1024
    num_bands: int = 64
    min_hz: float = 0.0
    max_hz: float = 0.0
    floor_db: float = -80.0
    rounds: int = 64
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.hop < 1 or self.window % 2 or self.window < 2 * self.hop:
            raise ConfigError(
                f"the mel codec needs a hop of at least 1 and an even window of at least two hops, "
                f"got hop={self.hop}, window={self.window}"
            )
        if self.num_bands < 1 or self.rounds < 0 or not self.floor_db < 0:
            raise ConfigError(
                f"the mel codec needs num_bands of at least 1, rounds of at least 0 and a negative "
                f"floor_db, got {self.num_bands}, {self.rounds} and {self.floor_db}"
            )
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ConfigError(
                f"the mel codec needs a finite mean and a std above 0, got mean={self.mean}, "
                f"std={self.std}"
            )
        if self.min_hz < 0 or (self.max_hz and self.max_hz <= self.min_hz):
            raise ConfigError(
                f"the mel codec's bands need 0 <= min_hz < max_hz, got {self.min_hz} and "
                f"{self.max_hz}"
            )

    def build(self, device: torch.device, sound: SoundFormat) -> MelCodec:
        """The codec on `device`. Raises EncoderError for bands that no frequency falls into."""
        return MelCodec(self, device, sound)


class MelCodec:
    """The codec; computed in float64, so that float32 latents do not depend on sums' order."""

    def __init__(self, config: MelConfig, device: torch.device, sound: SoundFormat) -> None:
        self.config = config
        self.format = sound
        self.hop = config.hop
        self.latent_channels = sound.num_channels * config.num_bands
        *analysis, mean, std = astuple(config)
        parts = ("mel 1", tuple(analysis), tuple(sound))
        # Levels as they are have the fingerprint that they always had: what was encoded stays good.
        named = repr(parts if (mean, std) == (0, 1) else (*parts, mean, std))
        self.fingerprint = hashlib.sha256(named.encode()).hexdigest()
        self._window_W = torch.hann_window(config.window, dtype=torch.float64, device=device)
        self._bands_MF = _bands(config, sound.rate_hz).to(device)
        # The power of a sine of full scale, over all frequencies (Parseval).
        self._full_scale = config.window * self._window_W.square().sum() / 4

    def encode(self, sound: Tensor) -> Tensor:
        """Float32 [A, N] to float32 [A M, N / hop, 1, 1]."""
        check_sound(sound, self)
        power_AtF = self._analyse(sound.to(self._window_W)).abs().square() / self._full_scale
        level_AtM = 10 * (power_AtF @ self._bands_MF.T).clamp(min=1e-24).log10()
        latents_AtM = 1 - 2 * level_AtM.clamp(min=self.config.floor_db) / self.config.floor_db
        latents_AtM = (latents_AtM - self.config.mean) / self.config.std
        return latents_AtM.transpose(1, 2).flatten(0, 1)[..., None, None].to(torch.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [A M, t, 1, 1] of any float dtype to float32 [A, t hop]."""
        check_sound_latents(latents, self)
        latents_At = latents.to(self._window_W)[..., 0, 0].unflatten(0, (-1, self.config.num_bands))
        latents_At = latents_At * self.config.std + self.config.mean
        level_AtM = (1 - latents_At.transpose(1, 2)) / 2 * self.config.floor_db
        heard = level_AtM > self.config.floor_db + 1e-9
        power_AtF = self._powers(10 ** (level_AtM.clamp(max=0) / 10) * heard) * self._full_scale
        return self._with_phases(power_AtF.sqrt()).clamp(-1, 1).to(torch.float32)

    def _powers(self, band_AtM: Tensor) -> Tensor:
        """[A, t, F] powers of at least 0 whose bands are about `band_AtM`."""
        bands = self._bands_MF
        power_AtF = band_AtM @ bands
        for _ in range(UPDATES):
            ratio_AtM = band_AtM / (power_AtF @ bands.T).clamp(min=1e-24)
            power_AtF = power_AtF * (ratio_AtM @ bands) / bands.sum(0).clamp(min=1e-12)
        return power_AtF

    def _with_phases(self, magnitude_AtF: Tensor) -> Tensor:
        """Sound [A, t hop] whose spectrogram has about these magnitudes."""
        shape = tuple(magnitude_AtF.shape)
        real, imaginary = (
            normal(generator("griffin_lim", part), shape).to(magnitude_AtF)
            for part in ("real", "imaginary")
        )
        spectrum = torch.polar(magnitude_AtF, torch.atan2(imaginary, real))
        previous = torch.zeros_like(spectrum)
        for _ in range(self.config.rounds):
            rebuilt = self._analyse(self._synthesise(spectrum))
            ahead = rebuilt + MOMENTUM * (rebuilt - previous)
            spectrum = magnitude_AtF * ahead / ahead.abs().clamp(min=1e-12)
            previous = rebuilt
        return self._synthesise(spectrum)

    def _analyse(self, sound_AN: Tensor) -> Tensor:
        """[A, N] to complex [A, N / hop, F]; frame k's window is centred on its own samples."""
        window, hop = self.config.window, self.hop
        margin = (window - hop) // 2
        padded = torch.nn.functional.pad(sound_AN, (margin, window - hop - margin))
        spectrum: Tensor = torch.fft.rfft(padded.unfold(1, window, hop) * self._window_W)
        return spectrum

    def _synthesise(self, spectrum: Tensor) -> Tensor:
        """Complex [A, t, F] to [A, t hop]: the least-squares inverse of `_analyse`."""
        window, hop = self.config.window, self.hop
        num_frames = spectrum.shape[1]
        total, margin = num_frames * hop + window - hop, (window - hop) // 2
        pieces = torch.fft.irfft(spectrum, n=window) * self._window_W
        squares = (self._window_W**2).expand(1, num_frames, window)
        sums: list[Tensor] = [
            torch.nn.functional.fold(
                part.transpose(1, 2), (1, total), (1, window), stride=(1, hop)
            ).reshape(-1, total)
            for part in (pieces, squares)
        ]
        sound = sums[0] / sums[1].clamp(min=1e-8)
        return sound[:, margin : margin + num_frames * hop]


def _bands(config: MelConfig, rate_hz: int) -> Tensor:
    """[M, F] float64: triangles between neighbours on the mel scale, with a peak of 1."""
    top_hz = config.max_hz or rate_hz / 2
    if top_hz > rate_hz / 2:
        raise EncoderError(
            f"the mel codec's max_hz is {top_hz:g}, above half of data.audio_rate={rate_hz}"
        )
    lowest, highest = (2595 * math.log10(1 + hz / 700) for hz in (config.min_hz, top_hz))
    mels = torch.linspace(lowest, highest, config.num_bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    hz_F = torch.arange(config.window // 2 + 1, dtype=torch.float64) * rate_hz / config.window
    low, peak, high = (edges[i : i + config.num_bands, None] for i in range(3))
    bands_MF = torch.minimum((hz_F - low) / (peak - low), (high - hz_F) / (high - peak)).clamp(
        min=0
    )
    if not bool((bands_MF.sum(1) > 0).all()):
        empty = int((bands_MF.sum(1) == 0).sum())
        raise EncoderError(
            f"{empty} of the mel codec's {config.num_bands} bands lie between two frequencies of "
            f"its window: use fewer num_bands, or a longer window than {config.window}"
        )
    return bands_MF
