"""A lossless video codec without weights: a multi-level 3D Haar wavelet transform.

Haar wavelets do not overlap, so that one latent cell holds exactly the pixels of one block of
`stride` frames, rows and columns: the transform is an orthonormal rotation of a block's pixels
(Haar, 1910; dyadic levels as in Mallat, "A theory for multiresolution signal decomposition",
IEEE PAMI 1989). It is computed by sums and differences alone, so that the bits do not depend on
the number of threads nor on what is encoded beside a clip.

Shape legend: T frames of H x W pixels; C = 3 B latent channels on a grid of t x h x w; B
coefficients per block and colour; G subbands.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kinodit.models.encoders.base import (
    EncoderError,
    VideoCodecConfig,
    check_video,
    grid_shape,
)
from kinodit.models.encoders.haar import Haar
from kinodit.models.encoders.standardisation import Standardisation
from kinodit.models.errors import ConfigError

MAX_LEVELS = 5


@dataclass(frozen=True, kw_only=True)
class WaveletConfig(VideoCodecConfig):
    """The wavelet codec.

    temporal_levels:   halvings of the frame axis; the temporal stride is 2 to this power
    spatial_levels:    halvings of rows and columns
    first_frame_alone: with temporal levels, the first latent frame holds the first frame alone
                       (held for a whole stride), so that clips have 1 + k stride frames and images
                       fit; otherwise clips have k stride frames, and images do not fit
    standardisation:   JSON file of subband means and deviations, written by `Standardisation.save`;
                       None leaves the coefficients of pixels in [-1, 1] as they are
    standardise_power: 1 gives every subband unit variance; at 0 subbands keep their proportions
                       and only the mean variance over channels is 1
    transform:         "joint" halves time together with rows and columns; "separable" halves rows
                       and columns first and then every subband in time, so that how each part of
                       the picture moves, slowly or fast, has coefficients of its own
    equalise_time:     each level of change in time gets the energy of what stands still
    gains:             subband name ("low@t3": the slowest change of the coarsest picture) ->
                       factor on top. Noise hides a subband later the more it is raised, so that a
                       model settles it earlier when it generates: motion before texture, say
    """

    name: Literal["wavelet"] = "wavelet"
    temporal_levels: int = 1
    spatial_levels: int = 2
    first_frame_alone: bool = True
    standardisation: str | None = None
    standardise_power: float = 1.0
    transform: Literal["joint", "separable"] = "joint"
    equalise_time: bool = False
    gains: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        levels = (self.temporal_levels, self.spatial_levels)
        if min(levels) < 0 or max(levels) > MAX_LEVELS:
            raise ConfigError(
                f"wavelet levels lie in 0..{MAX_LEVELS}, got temporal_levels={levels[0]}, "
                f"spatial_levels={levels[1]}"
            )
        if not 0 <= self.standardise_power <= 1:
            raise ConfigError(f"standardise_power lies in [0, 1], got {self.standardise_power}")
        names = [band.name for band in self.haar.subbands()]
        for name, gain in self.gains.items():
            if name not in names:
                raise ConfigError(
                    f"wavelet gains name subband {name!r}; with these levels there are "
                    f"{', '.join(names)}"
                )
            if not (gain > 0 and math.isfinite(gain)):
                raise ConfigError(f"wavelet gains are positive, got {name}: {gain}")

    @property
    def haar(self) -> Haar:
        """The transform of a block."""
        return Haar(self.temporal_levels, self.spatial_levels, self.transform == "separable")

    def build(self, device: torch.device) -> WaveletCodec:
        """The codec on `device`, with the standardisation that the config names."""
        if self.standardisation is None:
            return WaveletCodec(self, None, device)
        return WaveletCodec(self, Standardisation.load(Path(self.standardisation)), device)


class WaveletCodec:
    """The codec. Pixels survive encode and decode bit by bit while latents stay in float32."""

    def __init__(
        self, config: WaveletConfig, standardisation: Standardisation | None, device: torch.device
    ) -> None:
        self.config = config
        self.standardisation = standardisation
        self.stride = (
            2**config.temporal_levels,
            2**config.spatial_levels,
            2**config.spatial_levels,
        )
        self.latent_channels = 3 * math.prod(self.stride)
        self.device = device
        self.subbands = config.haar.subbands()
        self._mean_B3 = torch.zeros(self.latent_channels // 3, 3, device=device)
        self._scale_B3 = torch.ones(self.latent_channels // 3, 3, device=device)
        if standardisation is not None:
            self._set(standardisation)
        self.fingerprint = self._fingerprint()

    @property
    def holds_first_frame(self) -> bool:
        """Whether the first latent frame is the first frame, held for a whole stride."""
        return self.config.first_frame_alone and self.stride[0] > 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latent grid (t, h, w); EncoderError for sizes that do not divide."""
        return grid_shape((frames, height, width), self.stride, self.holds_first_frame)

    def encode(self, video: Tensor) -> Tensor:
        """Uint8 [T, H, W, 3] to float32 [C, t, h, w]; channels run over subbands, then colours."""
        coefficients_thwB3 = (self.coefficients(video) - self._mean_B3) / self._scale_B3
        return coefficients_thwB3.flatten(3).permute(3, 0, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [C, t, h, w] of any float dtype to uint8 [T, H, W, 3]."""
        if latents.ndim != 4 or latents.shape[0] != self.latent_channels:
            raise EncoderError(
                f"the wavelet codec has latents [{self.latent_channels}, t, h, w], "
                f"got {list(latents.shape)}"
            )
        latents = latents.to(self.device, torch.float32).permute(1, 2, 3, 0)
        coefficients_thwB3 = torch.unflatten(latents, 3, (-1, 3)) * self._scale_B3 + self._mean_B3
        blocks = self.config.haar.inverse(coefficients_thwB3)
        if self.holds_first_frame:
            # The held copies are equal but for rounding in a clip that was encoded; in a
            # generated one their mean is the nearest clip that could have been.
            first = blocks[:1].mean(3, keepdim=True)
            frames = [_unfold(first), _unfold(blocks[1:])]
        else:
            frames = [_unfold(blocks)]
        pixels = (torch.cat(frames) + 1) * 127.5
        return pixels.round_().clamp_(0, 255).to(torch.uint8)

    def coefficients(self, video: Tensor) -> Tensor:
        """Coefficients [t, h, w, B, 3] of a clip, before standardisation."""
        check_video(video)
        t, h, w = self.latent_shape(video.shape[0], video.shape[1], video.shape[2])
        pixels = video.to(self.device).to(torch.float32) / 127.5 - 1
        st, sh, sw = self.stride
        if self.holds_first_frame:
            pixels = torch.cat([pixels[:1].expand(st - 1, -1, -1, -1), pixels])
        blocks = pixels.reshape(t, st, h, sh, w, sw, 3).permute(0, 2, 4, 1, 3, 5, 6)
        return self.config.haar.forward(blocks)

    def _set(self, standardisation: Standardisation) -> None:
        expected = tuple(band.name for band in self.subbands)
        found = tuple(band.name for band in standardisation.subbands)
        if expected != found:
            raise EncoderError(
                f"the standardisation was measured for subbands {', '.join(found)}; this codec "
                f"has {', '.join(expected)}: measure it again with these levels"
            )
        config, power = self.config, self.config.standardise_power
        sizes = torch.tensor([band.size for band in self.subbands])
        mean_G3 = torch.tensor([band.mean for band in standardisation.subbands])
        std_G3 = torch.tensor([band.std for band in standardisation.subbands])
        factor_G1 = torch.tensor([[config.gains.get(band.name, 1.0)] for band in self.subbands])
        if config.equalise_time:
            energy_G = sizes * (std_G3 ** (1 - power)).square().sum(1)
            tempo_G = torch.tensor([band.tempo for band in self.subbands])
            for tempo in range(1, config.temporal_levels + 1):
                ratio = energy_G[tempo_G == 0].sum() / energy_G[tempo_G == tempo].sum()
                factor_G1[tempo_G == tempo] *= ratio.sqrt()
        std_B3 = std_G3.repeat_interleave(sizes, dim=0)
        factor_B1 = factor_G1.repeat_interleave(sizes, dim=0)
        level = (factor_B1 * std_B3 ** (1 - power)).square().mean().sqrt()
        self._mean_B3 = mean_G3.repeat_interleave(sizes, dim=0).to(self.device)
        self._scale_B3 = (std_B3**power * level / factor_B1).to(self.device)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"wavelet 1")
        parts = (
            self.config.temporal_levels,
            self.config.spatial_levels,
            self.holds_first_frame,
            self.config.transform,
        )
        digest.update(repr(parts).encode())
        for tensor in (self._mean_B3, self._scale_B3):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def _unfold(blocks: Tensor) -> Tensor:
    """Blocks [t, h, w, st, sh, sw, 3] to frames [t st, h sh, w sw, 3]."""
    return blocks.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def fit_standardisation(codec: WaveletCodec, videos: Iterable[Tensor]) -> WaveletCodec:
    """The codec with means and deviations measured on `videos` (uint8 [T, H, W, 3] each).

    A first frame that stands alone has no motion by construction, and does not count for the
    subbands of motion. Raises EncoderError when there is no video.
    """
    bands = codec.subbands
    count_G = torch.zeros(len(bands), dtype=torch.float64)
    sum_G3 = torch.zeros(len(bands), 3, dtype=torch.float64)
    square_G3 = torch.zeros_like(sum_G3)
    num_videos = 0
    for video in videos:
        num_videos += 1
        start = 0
        coefficients_thwB3 = codec.coefficients(video).cpu().to(torch.float64)
        for index, band in enumerate(bands):
            skipped = 1 if band.tempo and codec.holds_first_frame else 0
            part = coefficients_thwB3[skipped:, :, :, start : start + band.size].reshape(-1, 3)
            start += band.size
            count_G[index] += part.shape[0]
            sum_G3[index] += part.sum(0)
            square_G3[index] += part.square().sum(0)
    if num_videos == 0:
        raise EncoderError("a standardisation needs at least one video to be measured on")
    # A subband that was never seen (motion, where all videos are images) counts as constant.
    mean_G3 = sum_G3 / count_G.clamp(min=1).unsqueeze(1)
    std_G3 = (square_G3 / count_G.clamp(min=1).unsqueeze(1) - mean_G3.square()).clamp(min=0).sqrt()
    standardisation = Standardisation.measured(
        [band.name for band in bands], mean_G3.tolist(), std_G3.tolist(), num_videos
    )
    return WaveletCodec(codec.config, standardisation, codec.device)
