"""Video (and image) autoencoders of `diffusers` from a local folder.

Shape legend: T frames of H x W
pixels; C latent channels on a grid of t x h x w.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kinodit.models.encoders.autoencoder import load_autoencoder
from kinodit.models.encoders.base import (
    EncoderError,
    Posterior,
    VideoCodecConfig,
    check_video,
    grid_shape,
)
from kinodit.models.encoders.folder import fingerprint, read_json, weights_folder
from kinodit.models.encoders.offload import Resident
from kinodit.models.random import generator, normal


@dataclass(frozen=True)
class VaeFamily:
    """What an autoencoder's class does not say itself.

    framewise: an image autoencoder, which takes each frame on its own
    clip_step: frames after the first come in multiples of this many temporal strides (CogVideoX's
               decoder gives too many frames for an even number of latent ones)
    """

    framewise: bool = False
    clip_step: int = 1


FAMILIES = {
    "AutoencoderKL": VaeFamily(framewise=True),
    "AutoencoderKLCogVideoX": VaeFamily(clip_step=2),
    "AutoencoderKLHunyuanVideo": VaeFamily(),
    "AutoencoderKLHunyuanVideo15": VaeFamily(),
    "AutoencoderKLLTX2Video": VaeFamily(),
    "AutoencoderKLLTXVideo": VaeFamily(),
    "AutoencoderKLMochi": VaeFamily(),
    "AutoencoderKLWan": VaeFamily(),
}
"""Classes that a folder's config.json may name; all others are refused."""


@dataclass(frozen=True, kw_only=True)
class DiffusersVaeConfig(VideoCodecConfig):
    """A diffusers autoencoder in a local folder.

    path:      folder with config.json and *.safetensors
    posterior: "mean"; a "sample" whose noise is a function of the clip's pixels; or "resample":
               drawn anew each time that the clip is trained on
    tiling:    encode and decode large pictures in overlapping tiles: less memory, other latents
    dtype:     of the weights; latents are float32
    offload:   weights are in the host's memory while nothing is encoded or decoded
    """

    name: Literal["diffusers_vae"] = "diffusers_vae"
    path: str | None = None
    posterior: Literal["mean", "sample", "resample"] = "mean"
    tiling: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    offload: bool = False

    def build(self, device: torch.device) -> DiffusersVae:
        """The codec on `device`. Raises EncoderError or MissingExtraError."""
        return DiffusersVae(self, device)


class DiffusersVae:
    """A frozen autoencoder; latents are normalised as its own pipeline does."""

    def __init__(self, config: DiffusersVaeConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._folder = weights_folder(config.path, None, "video codec 'diffusers_vae'")
        class_name = str(read_json(self._folder / "config.json").get("_class_name"))
        if class_name not in FAMILIES:
            raise EncoderError(
                f"{self._folder} holds a {class_name}; known video autoencoders are "
                f"{', '.join(sorted(FAMILIES))}"
            )
        self._family = FAMILIES[class_name]
        self._vae = load_autoencoder(self._folder, class_name, config.dtype, "diffusers")
        self._resident = Resident(self._vae, device, offload=config.offload)
        if config.tiling:
            self._vae.enable_tiling()
        facts = self._vae.config
        self.latent_channels: int = facts.get("latent_channels") or facts.get("z_dim")
        self.stride = _stride(self._vae, self._family)
        self._mean_C111, self._scale_C111 = _normalisation(self._vae, self.latent_channels, device)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings that matter and of the weights."""
        settings = asdict(self._config)
        del settings["path"], settings["offload"]
        return fingerprint([self._folder], sorted(settings.items()))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latent grid (t, h, w); EncoderError for sizes that do not fit."""
        st, sh, sw = self.stride
        steps = self._family.clip_step
        t, h, w = grid_shape((frames, height, width), (st * steps, sh, sw), st > 1)
        return (1 + (t - 1) * steps if st > 1 else t), h, w

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Uint8 [T, H, W, 3] to float32 [C, t, h, w]."""
        mean, std = self._moments(video)
        if self._config.posterior == "sample":
            digest = hashlib.sha256(video.cpu().contiguous().numpy().tobytes()).hexdigest()
            noise = normal(generator("posterior", digest), mean.shape).to(self._device)
            mean = mean + std * noise
        return (mean - self._mean_C111) * self._scale_C111

    @torch.no_grad()
    def posterior(self, video: Tensor) -> Posterior:
        """Uint8 [T, H, W, 3] to [C, t, h, w] as `encode`, and with resample their log-variance."""
        if self._config.posterior != "resample":
            return Posterior(self.encode(video))
        mean, std = self._moments(video)
        logvar = 2 * torch.log(std * self._scale_C111)
        return Posterior((mean - self._mean_C111) * self._scale_C111, logvar)

    def _moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [C, t, h, w] in the autoencoder's own units."""
        check_video(video)
        shape = self.latent_shape(video.shape[0], video.shape[1], video.shape[2])
        pixels = video.to(self._device).to(torch.float32) / 127.5 - 1
        with self._resident.use():
            posterior = self._vae.encode(self._to_vae(pixels.permute(3, 0, 1, 2))).latent_dist
        latents = self._from_vae(posterior.mean)
        if tuple(latents.shape) != (self.latent_channels, *shape):
            raise EncoderError(
                f"the autoencoder in {self._folder} made latents {list(latents.shape)} of frames "
                f"{list(video.shape)}, where its config promises "
                f"{[self.latent_channels, *shape]}"
            )
        return latents, self._from_vae(posterior.std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [C, t, h, w] to uint8 [T, H, W, 3]."""
        if latents.ndim != 4 or latents.shape[0] != self.latent_channels:
            raise EncoderError(
                f"the autoencoder in {self._folder} has latents [{self.latent_channels}, t, h, w], "
                f"got {list(latents.shape)}"
            )
        z = latents.to(self._device, torch.float32) / self._scale_C111 + self._mean_C111
        extra = {}
        if self._vae.config.get("timestep_conditioning"):
            # LTX-Video's decoder can denoise on its way; level 0 takes latents as clean.
            extra["temb"] = torch.zeros(1, device=self._device, dtype=self._vae.dtype)
        with _own_draws(self._device), self._resident.use():
            pixels = self._from_vae(self._vae.decode(self._to_vae(z), **extra).sample)
        frames = ((pixels + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        return frames.permute(1, 2, 3, 0).contiguous()

    def _to_vae(self, value: Tensor) -> Tensor:
        """[C, t, h, w] to the autoencoder's batch."""
        batch = value.transpose(0, 1) if self._family.framewise else value.unsqueeze(0)
        return batch.to(self._vae.dtype)

    def _from_vae(self, batch: Tensor) -> Tensor:
        """The autoencoder's batch to float32 [C, t, h, w]."""
        value = batch.transpose(0, 1) if self._family.framewise else batch.squeeze(0)
        return value.to(torch.float32)


def _stride(vae: Any, family: VaeFamily) -> tuple[int, int, int]:
    """Frames, rows and columns per latent cell. Each class keeps them in a place of its own."""
    facts = {**vars(vae), **{key: value for key, value in vae.config.items() if value is not None}}
    spatial = facts.get("scale_factor_spatial") or facts.get("spatial_compression_ratio")
    if spatial is None:
        spatial = 2 ** (len(facts["block_out_channels"]) - 1)
    if family.framewise:
        return 1, int(spatial), int(spatial)
    temporal = facts.get("scale_factor_temporal") or facts["temporal_compression_ratio"]
    return int(temporal), int(spatial), int(spatial)


def _normalisation(vae: Any, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and scale [C, 1, 1, 1]: the diffusion model sees (z - mean) * scale.

    Statistics are buffers (LTX) or configuration (Wan, Mochi); the others have a factor, and image
    autoencoders a shift.
    """
    facts = vae.config

    def statistic(name: str, default: float) -> Tensor:
        value = getattr(vae, name) if name in dict(vae.named_buffers()) else facts.get(name)
        if value is None:
            return torch.full((channels,), default)
        return torch.as_tensor(value).to("cpu", torch.float32)

    shift: float = facts.get("shift_factor") or 0.0
    factor: float = facts.get("scaling_factor") or 1.0
    mean = statistic("latents_mean", shift)
    scale = factor / statistic("latents_std", 1.0)
    return mean.reshape(-1, 1, 1, 1).to(device), scale.reshape(-1, 1, 1, 1).to(device)


@contextmanager
def _own_draws(device: torch.device) -> Iterator[None]:
    """Same draws at every call, and none from the process: some decoders inject noise."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
