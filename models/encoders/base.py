"""What an encoder is: captions to token features, pixels and sound to latents and back.

Encoders are frozen: they are built once on a device, have no trainable parameter, never touch the
network and never run code that comes with weights. Shape legend: L text tokens, D features;
T frames of H x W pixels; A sound channels of N samples; C latent channels on a grid of t x h x w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kinodit.models.errors import UserError
from kinodit.models.random import normal


class EncoderError(UserError):
    """An encoder cannot be built from what the config names, or cannot take what it is given."""


@dataclass(frozen=True)
class TextFeatures:
    """One encoded caption.

    tokens: [L, D] float32, real tokens only, at least one
    pooled: [D_pooled] float32, one vector for the whole caption
    """

    tokens: Tensor
    pooled: Tensor

    def to(self, device: torch.device) -> TextFeatures:
        """The same on `device`."""
        return TextFeatures(self.tokens.to(device), self.pooled.to(device))


@dataclass(frozen=True)
class Posterior:
    """What a codec knows of a clip's latents.

    mean:   [C, t, h, w] float32
    logvar: [C, t, h, w] float32, the logarithm of their variance; None: they are the mean
    """

    mean: Tensor
    logvar: Tensor | None = None

    def to(self, device: torch.device) -> Posterior:
        """The same on `device`."""
        return Posterior(
            self.mean.to(device), None if self.logvar is None else self.logvar.to(device)
        )

    def draw(self, source: np.random.Generator) -> Tensor:
        """Latents [C, t, h, w]: the mean, and noise of `source` times the deviation."""
        if self.logvar is None:
            return self.mean
        noise = normal(source, tuple(self.mean.shape)).to(self.mean.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class TextEncoder(Protocol):
    """Captions to features. `fingerprint` changes when the features could."""

    @property
    def token_dim(self) -> int:
        """Features per token, D."""

    @property
    def pooled_dim(self) -> int:
        """Length of the pooled vector."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption at most: longer ones are cut."""

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights: the key of cached features."""

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features of each caption, on the encoder's device, independent of the others."""


@runtime_checkable
class SplitTextEncoder(Protocol):
    """A text encoder whose weights several callers hold together, each a part.

    `encode` is for all of them at once: each brings captions of its own, or none.
    """

    @property
    def empty(self) -> TextFeatures:
        """Features of the empty caption, which each knows without the others."""

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features of each caption, as those of `TextEncoder`. Collective."""


class VideoCodec(Protocol):
    """Pixels to latents and back. `fingerprint` changes when the latents could.

    An image is a video of one frame.
    """

    @property
    def latent_channels(self) -> int:
        """Channels of a latent cell, C."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per latent cell."""

    @property
    def fingerprint(self) -> str:
        """Hash of configuration, statistics and weights: the key of cached latents."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latent grid (t, h, w) of a clip; EncoderError says which sizes fit otherwise."""

    def encode(self, video: Tensor) -> Tensor:
        """Uint8 [T, H, W, 3] to float32 latents [C, t, h, w] on the codec's device."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [C, t, h, w] to uint8 [T, H, W, 3] on the codec's device."""


class SoundFormat(NamedTuple):
    """How sound is sampled: samples per second and channel, and channels (1 or 2)."""

    rate_hz: int
    num_channels: int


class AudioCodec(Protocol):
    """Sound to latents and back. `fingerprint` changes when the latents could.

    Latent frame k is the sound of seconds k * hop / rate to (k + 1) * hop / rate.
    """

    @property
    def format(self) -> SoundFormat:
        """The sound that it takes and gives."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame, C."""

    @property
    def hop(self) -> int:
        """Samples (of each channel) per latent frame."""

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights: the key of cached latents."""

    def encode(self, sound: Tensor) -> Tensor:
        """Float32 [A, N], N a multiple of `hop`, to float32 latents [C, N / hop, 1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [C, t, 1, 1] to float32 [A, t * hop] in [-1, 1]; both on the codec's device."""


@runtime_checkable
class PosteriorCodec(Protocol):
    """A codec whose latents are drawn anew each time."""

    def posterior(self, media: Tensor) -> Posterior:
        """Of media as `encode` takes them (uint8 [T, H, W, 3]), before anything is drawn."""


def posterior_of(codec: VideoCodec | AudioCodec, media: Tensor) -> Posterior:
    """What `codec` knows of the latents of `media`: frames [T, H, W, 3] or sound [A, N]."""
    if isinstance(codec, PosteriorCodec):
        return codec.posterior(media)
    return Posterior(codec.encode(media))


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(ABC):
    """Which text encoder, and its settings."""

    name: str

    @abstractmethod
    def build(self, device: torch.device) -> TextEncoder:
        """The encoder on `device`. Raises EncoderError or MissingExtraError."""


@dataclass(frozen=True, kw_only=True)
class VideoCodecConfig(ABC):
    """Which video codec, and its settings."""

    name: str

    @abstractmethod
    def build(self, device: torch.device) -> VideoCodec:
        """The codec on `device`. Raises EncoderError or MissingExtraError."""


@dataclass(frozen=True, kw_only=True)
class AudioCodecConfig(ABC):
    """Which audio codec, and its settings."""

    name: str

    @abstractmethod
    def build(self, device: torch.device, sound: SoundFormat) -> AudioCodec:
        """The codec on `device` for `sound`. Raises EncoderError or MissingExtraError."""


def build_text_encoder(config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """The text encoder that a config names."""
    return config.build(device)


def build_video_codec(config: VideoCodecConfig, device: torch.device) -> VideoCodec:
    """The video codec that a config names."""
    return config.build(device)


def build_audio_codec(
    config: AudioCodecConfig, device: torch.device, sound: SoundFormat
) -> AudioCodec:
    """The audio codec that a config names, for sound of the recipe's format."""
    return config.build(device, sound)


def check_sound(sound: Tensor, codec: AudioCodec) -> None:
    """Raise EncoderError unless `sound` is float32 [A, N] in whole latent frames of `codec`."""
    num_channels = codec.format.num_channels
    if sound.dtype != torch.float32 or sound.ndim != 2 or sound.shape[0] != num_channels:
        raise EncoderError(
            f"the audio codec takes float32 sound [{num_channels}, samples], got {sound.dtype} "
            f"{list(sound.shape)}"
        )
    if sound.shape[1] % codec.hop or not sound.shape[1]:
        raise EncoderError(
            f"{sound.shape[1]} samples are no whole number of latent frames of {codec.hop} samples"
        )


def check_sound_latents(latents: Tensor, codec: AudioCodec) -> None:
    """Raise EncoderError unless `latents` are [C, t, 1, 1] of `codec`."""
    if latents.ndim != 4 or latents.shape[0] != codec.latent_channels or latents[0, 0].numel() != 1:
        raise EncoderError(
            f"the audio codec has latents [{codec.latent_channels}, t, 1, 1], "
            f"got {list(latents.shape)}"
        )


def check_video(video: Tensor) -> None:
    """Raise EncoderError unless `video` is uint8 [T, H, W, 3]."""
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise EncoderError(
            f"a codec takes uint8 frames [T, H, W, 3], got {video.dtype} {list(video.shape)}"
        )


def grid_shape(
    size: tuple[int, int, int], stride: tuple[int, int, int], first_frame_alone: bool
) -> tuple[int, int, int]:
    """The latent grid of `size` (frames, height, width) at `stride`.

    With `first_frame_alone` the first latent frame holds one frame, the others `stride[0]` each.
    Raises EncoderError for sizes that do not divide, naming the nearest ones that do.
    """
    grid = []
    lead = 1 if first_frame_alone and stride[0] > 1 else 0
    for axis, length, step, alone in zip(
        ("frames", "height", "width"), size, stride, (lead, 0, 0), strict=True
    ):
        cells, rest = divmod(length - alone, step)
        if rest or cells + alone < 1:
            below = alone + cells * step
            nearest = [str(n) for n in (below, below + step) if n > 0]
            rule = f"1 + a multiple of {step}" if alone else f"a multiple of {step}"
            raise EncoderError(
                f"{axis} {length} does not fit the codec, which takes {rule}: "
                f"use {' or '.join(nearest)}"
            )
        grid.append(cells + alone)
    return grid[0], grid[1], grid[2]
