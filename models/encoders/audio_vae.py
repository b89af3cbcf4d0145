"""Audio autoencoders from a local folder: EnCodec and DAC of transformers, Oobleck of diffusers.

Oobleck is Stable Audio's (Evans et al., arXiv 2404.10301). Of EnCodec (Defossez et al., arXiv
2210.13438) and DAC (Kumar et al., arXiv 2306.06546) the latents are what enters the quantiser.

Shape legend: A sound channels, N samples, C latent channels, t latent frames.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kinodit.models.encoders.autoencoder import Dtype, load_autoencoder
from kinodit.models.encoders.base import (
    AudioCodecConfig,
    EncoderError,
    SoundFormat,
    check_sound,
    check_sound_latents,
)
from kinodit.models.encoders.folder import fingerprint, read_json, weights_folder
from kinodit.models.encoders.offload import Resident
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal


@dataclass(frozen=True, kw_only=True)
class AudioVaeConfig(AudioCodecConfig):
    """An audio autoencoder in a local folder.

    path:      folder with config.json and *.safetensors
    posterior: of Oobleck: "mean", or a "sample" whose noise is a function of the sound
    quantise:  of EnCodec and DAC: latents go through all codebooks before they become sound, as
               in their training
    factor:    multiplies latents, whose size these autoencoders leave as it comes
    dtype:     of the weights; latents are float32
    offload:   weights are in the host's memory while nothing is encoded or decoded
    """

    name: Literal["audio_vae"] = "audio_vae"
    path: str | None = None
    posterior: Literal["mean", "sample"] = "mean"
    quantise: bool = True
    factor: float = 1.0
    dtype: Dtype = "float32"
    offload: bool = False

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ConfigError(f"an audio autoencoder's factor is above 0, got {self.factor}")

    def build(self, device: torch.device, sound: SoundFormat) -> AudioVae:
        """The codec on `device`. Raises EncoderError or MissingExtraError."""
        return AudioVae(self, device, sound)


@dataclass(frozen=True)
class _Family:
    """How one class is used: its facts, its two halves and its quantiser."""

    library: Literal["diffusers", "transformers"]
    format: Callable[[Any], SoundFormat]
    hop: Callable[[Any], int]
    channels: Callable[[Any], int]
    quantised: Callable[[Any, Tensor], Tensor] | None


def _encodec_quantised(model: Any, latents: Tensor) -> Tensor:
    codes = model.quantizer.encode(latents, max(model.config.target_bandwidths))
    return torch.as_tensor(model.quantizer.decode(codes))


FAMILIES = {
    "EncodecModel": _Family(
        "transformers",
        lambda config: SoundFormat(config.sampling_rate, config.audio_channels),
        lambda config: math.prod(config.upsampling_ratios),
        lambda config: int(config.hidden_size),
        _encodec_quantised,
    ),
    "DacModel": _Family(
        "transformers",
        lambda config: SoundFormat(config.sampling_rate, 1),
        lambda config: math.prod(config.downsampling_ratios),
        lambda config: int(config.hidden_size),
        lambda model, latents: torch.as_tensor(model.quantizer(latents)[0]),
    ),
    "AutoencoderOobleck": _Family(
        "diffusers",
        lambda config: SoundFormat(config.sampling_rate, config.audio_channels),
        lambda config: math.prod(config.downsampling_ratios),
        lambda config: int(config.decoder_input_channels),
        None,
    ),
}
"""Classes that a folder's config.json may name; all others are refused."""


class AudioVae:
    """A frozen autoencoder of sound."""

    def __init__(self, config: AudioVaeConfig, device: torch.device, sound: SoundFormat) -> None:
        self._config = config
        self._device = device
        self._folder = weights_folder(config.path, None, "audio codec 'audio_vae'")
        document = read_json(self._folder / "config.json")
        found = document.get("_class_name") or next(iter(document.get("architectures") or []), None)
        if found not in FAMILIES:
            raise EncoderError(
                f"{self._folder} holds a {found}; known audio autoencoders are "
                f"{', '.join(sorted(FAMILIES))}"
            )
        self._family = family = FAMILIES[found]
        if document.get("normalize") or document.get("chunk_length_s"):
            raise EncoderError(
                f"the EnCodec in {self._folder} scales and cuts sound into pieces (normalize, "
                "chunk_length_s), and the scales would be lost: use one that does not, such as "
                "encodec_24khz"
            )
        self._model = load_autoencoder(self._folder, found, config.dtype, family.library)
        self._resident = Resident(self._model, device, offload=config.offload)
        self.format = family.format(self._model.config)
        self.hop = family.hop(self._model.config)
        self.latent_channels = family.channels(self._model.config)
        if sound != self.format:
            raise EncoderError(
                f"the {found} in {self._folder} takes {self.format.rate_hz} Hz and "
                f"{self.format.num_channels} channel(s), the recipe has {sound.rate_hz} Hz and "
                f"{sound.num_channels}: set data.audio_rate={self.format.rate_hz} and "
                f"data.audio_channels={self.format.num_channels}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings and of the files of weights."""
        settings = asdict(self._config)
        del settings["path"], settings["offload"]
        return fingerprint([self._folder], sorted(settings.items()))

    @torch.no_grad()
    def encode(self, sound: Tensor) -> Tensor:
        """Float32 [A, N] to float32 [C, N / hop, 1, 1]."""
        check_sound(sound, self)
        batch = sound.to(self._device, self._model.dtype).unsqueeze(0)
        with self._resident.use():
            latents = self._latents(batch, sound)
        expected = [1, self.latent_channels, sound.shape[1] // self.hop]
        if list(latents.shape) != expected:
            raise EncoderError(
                f"the autoencoder in {self._folder} made latents {list(latents.shape)} of "
                f"{sound.shape[1]} samples, where its config promises {expected}"
            )
        features: Tensor = latents[0, :, :, None, None] * self._config.factor
        return features

    def _latents(self, batch: Tensor, sound: Tensor) -> Tensor:
        """[1, C, N / hop] of a batch of one sound, in the autoencoder's own units."""
        if self._family.quantised is None:
            posterior = self._model.encode(batch).latent_dist
            latents = posterior.mean.to(torch.float32)
            if self._config.posterior == "sample":
                digest = hashlib.sha256(sound.cpu().contiguous().numpy().tobytes()).hexdigest()
                noise = normal(generator("posterior", digest), tuple(latents.shape))
                latents = latents + posterior.std.to(torch.float32) * noise.to(self._device)
        else:
            latents = self._model.encoder(batch).to(torch.float32)
        made: Tensor = latents
        return made

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [C, t, 1, 1] to float32 [A, t hop]."""
        check_sound_latents(latents, self)
        batch = latents[None, :, :, 0, 0].to(self._device, torch.float32) / self._config.factor
        batch = batch.to(self._model.dtype)
        with self._resident.use():
            if self._family.quantised is not None and self._config.quantise:
                batch = self._family.quantised(self._model, batch)
            sound: Tensor = self._model.decoder(batch)[0].to(torch.float32).clamp(-1, 1)
        # DAC's odd strides lose a few samples at the end.
        missing = latents.shape[1] * self.hop - sound.shape[1]
        return torch.nn.functional.pad(sound, (0, missing))
