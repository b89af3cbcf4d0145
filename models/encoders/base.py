"""What an encoder is: captions to token features, pixels to latents and back.

Encoders are frozen: they are built once on a device, have no trainable parameter, never touch the
network and never run code that comes with weights. Shape legend: L text tokens, D features;
T frames of H x W pixels; C latent channels on a grid of t x h x w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kinodit.models.errors import UserError


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


def build_text_encoder(config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """The text encoder that a config names."""
    return config.build(device)


def build_video_codec(config: VideoCodecConfig, device: torch.device) -> VideoCodec:
    """The video codec that a config names."""
    return config.build(device)


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
