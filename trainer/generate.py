"""Clips and sounds from prompts: each prompt is its own pack, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kinodit.data.encode import AUDIO, VIDEO, EncodedSample, SampleEncoder
from kinodit.data.packing import PackSpec, filler, pack, patch_grid, unpatchify
from kinodit.models.diffusion.field import velocity_field
from kinodit.models.diffusion.guidance import GuidanceConfig, guided
from kinodit.models.diffusion.objective import Objective
from kinodit.models.diffusion.samplers import SamplerConfig, sample, time_grid
from kinodit.models.errors import ConfigError
from kinodit.models.moe.cache import cached_experts
from kinodit.models.random import generator, normal
from kinodit.models.tokens import SampleKey, TokenBatch
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine, Forward


@dataclass(frozen=True)
class SampleConfig:
    """Clips drawn during training, and the defaults of `kinodit sample`.

    every_steps:  0 = never
    prompts:      one clip each
    ema:          name of the average to sample with, "" = the parameters as they are
    sound_format: of files of sound, which are written beside clips that have it
    """

    every_steps: int = 0
    prompts: tuple[str, ...] = ()
    seed: int = 0
    ema: str = ""
    sound_format: Literal["wav", "flac"] = "wav"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"sample.every_steps={self.every_steps}: must not be negative")


@dataclass(frozen=True)
class ClipShape:
    """What to generate: pixels, frames per second, and samples of its sound (of each channel)."""

    num_frames: int
    height: int
    width: int
    fps: float
    num_samples: int = 0


@dataclass(frozen=True)
class Clip:
    """What was generated for a prompt.

    video: uint8 [T, H, W, 3]; None: there is only sound
    sound: float32 [A, N] in [-1, 1] at `rate_hz`; None: there is none
    """

    index: int
    prompt: str
    seed: int
    fps: float
    video: Tensor | None
    sound: Tensor | None = None
    rate_hz: int = 0


@contextmanager
def using_ema(emas: Mapping[str, Ema], name: str) -> Iterator[None]:
    """Compute with the named average inside the context; "" leaves the parameters."""
    if not name:
        yield
        return
    if name not in emas:
        raise ConfigError(f"there is no average {name!r}; the recipe's ema has {sorted(emas)}")
    with emas[name].swapped_in():
        yield


@dataclass
class Generator:
    """Draws clips with a model under any engine."""

    engine: Engine
    objective: Objective
    encoder: SampleEncoder
    spec: PackSpec
    dtype: torch.dtype
    rank: int
    num_ranks: int

    def __call__(
        self, prompts: Sequence[str], shape: ClipShape, config: SampleConfig, shift: float
    ) -> list[Clip]:
        """This rank's clips: prompts rank, rank + num_ranks, ...

        Ranks that share packs have equal `rank`, and draw the same clips together.

        Collective: a rank that has run out of prompts goes on with empty packs, so that all ranks
        make the same number of forward passes. A clip's noise depends on seed, prompt and the
        prompt's place alone, so it is bit-equal on any number of ranks.
        """
        clips = []
        rounds = -(-len(prompts) // self.num_ranks)
        with self.engine.inference() as forward, cached_experts(self.engine.model):
            for turn in range(rounds):
                index = turn * self.num_ranks + self.rank
                prompt = prompts[index] if index < len(prompts) else None
                made = self._latents(forward, prompt, index, shape, config, shift)
                if prompt is not None:
                    clips.append(self._clip(made, prompt, index, shape, config.seed))
        return clips

    def _latents(
        self,
        forward: Forward,
        prompt: str | None,
        index: int,
        shape: ClipShape,
        config: SampleConfig,
        shift: float,
    ) -> dict[str, Tensor]:
        """Stream -> latents [C, t, h, w] of what was generated; nothing for an empty pack."""
        if prompt is None:
            with_text = without_text = filler(self.spec)
        else:
            with_text = self._pack(prompt, index, shape)
            without_text = self._pack("", index, shape)
        x = {}
        for stream in self.spec.streams:
            if stream.patch is not None:
                x[stream.name] = with_text.modalities[stream.name].latents
                if prompt is not None:
                    source = generator(config.seed, "sample", index, prompt, stream.name)
                    x[stream.name] = normal(source, tuple(x[stream.name].shape))
        device = self.engine.device
        conditional = velocity_field(forward, self.objective, with_text.to(device))
        unconditional = velocity_field(forward, self.objective, without_text.to(device))
        velocity = guided(conditional, unconditional, config.guidance, with_text.to(device))
        grid = time_grid(config.sampler.steps, config.sampler.shift or shift)
        start = {name: noise.to(device, self.dtype) for name, noise in x.items()}
        tokens = sample(velocity, start, grid, config.sampler.method)
        latents = {}
        for stream in self.spec.streams:
            if stream.patch is not None and len(tokens[stream.name]):
                cells = self.grids(shape)[stream.name]
                grid_of = patch_grid((stream.channels, *cells), stream.patch)
                latents[stream.name] = unpatchify(tokens[stream.name], grid_of, stream.patch)
        return latents

    def _clip(
        self, latents: Mapping[str, Tensor], prompt: str, index: int, shape: ClipShape, seed: int
    ) -> Clip:
        """Latents turned into pixels and sound, on the host."""
        encoders = self.encoder.encoders
        video = sound = None
        if VIDEO in latents:
            assert encoders.video is not None
            video = encoders.video.decode(latents[VIDEO].to(torch.float32)).cpu()
        rate_hz = 0
        if AUDIO in latents:
            assert encoders.audio is not None
            sound = encoders.audio.decode(latents[AUDIO].to(torch.float32)).cpu()
            sound = sound[:, : shape.num_samples]
            rate_hz = encoders.audio.format.rate_hz
        return Clip(index, prompt, seed, shape.fps, video, sound, rate_hz)

    def grids(self, shape: ClipShape) -> dict[str, tuple[int, int, int]]:
        """Stream -> latent frames, rows and columns; a stream that the clip lacks is left out."""
        encoders, grids = self.encoder.encoders, {}
        if encoders.video is not None:
            grids[VIDEO] = encoders.video.latent_shape(shape.num_frames, shape.height, shape.width)
        if encoders.audio is not None and shape.num_samples:
            grids[AUDIO] = encoders.num_audio_frames(shape.num_samples), 1, 1
        return grids

    def _pack(self, prompt: str, index: int, shape: ClipShape) -> TokenBatch:
        """A pack of one segment whose latents are zeros of the right shape."""
        encoders, grids = self.encoder.encoders, self.grids(shape)
        text, conditions = self.encoder.text(prompt)
        encoded = EncodedSample(
            key=SampleKey(step=0, slot=index, sample="prompt"),
            latents={
                stream.name: torch.zeros(stream.channels, *grids[stream.name])
                for stream in self.spec.streams
                if stream.name in grids
            },
            seconds=encoders.seconds(shape.fps),
            text=text,
            conditions=conditions,
        )
        return pack([encoded], self.spec)
