"""Clips from prompts: each prompt is its own pack, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinodit.data.encode import EncodedSample, SampleEncoder
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

VIDEO = "video"


@dataclass(frozen=True)
class SampleConfig:
    """Clips drawn during training, and the defaults of `kinodit sample`.

    every_steps: 0 = never; prompts: one clip each; ema: name of the average to sample with, "" =
    the parameters as they are
    """

    every_steps: int = 0
    prompts: tuple[str, ...] = ()
    seed: int = 0
    ema: str = ""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"sample.every_steps={self.every_steps}: must not be negative")


@dataclass(frozen=True)
class ClipShape:
    """What to generate: pixels and frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Clip:
    """A generated clip. video: uint8 [T, H, W, 3]."""

    index: int
    prompt: str
    seed: int
    fps: float
    video: Tensor


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
                video = self._clip(forward, prompt, index, shape, config, shift)
                if prompt is not None and video is not None:
                    clips.append(Clip(index, prompt, config.seed, shape.fps, video))
        return clips

    def _clip(
        self,
        forward: Forward,
        prompt: str | None,
        index: int,
        shape: ClipShape,
        config: SampleConfig,
        shift: float,
    ) -> Tensor | None:
        """uint8 [T, H, W, 3]; None for an empty pack."""
        if prompt is None:
            with_text = without_text = filler(self.spec)
            x = with_text.modalities[VIDEO].latents
        else:
            with_text = self._pack(prompt, index, shape)
            without_text = self._pack("", index, shape)
            source = generator(config.seed, "sample", index, prompt, VIDEO)
            x = normal(source, tuple(with_text.modalities[VIDEO].latents.shape))
        device = self.engine.device
        conditional = velocity_field(forward, self.objective, with_text.to(device))
        unconditional = velocity_field(forward, self.objective, without_text.to(device))
        velocity = guided(conditional, unconditional, config.guidance, with_text.to(device))
        grid = time_grid(config.sampler.steps, config.sampler.shift or shift)
        start = {VIDEO: x.to(device, self.dtype)}
        tokens = sample(velocity, start, grid, config.sampler.method)[VIDEO]
        if prompt is None:
            return None
        codec = self.encoder.video_codec
        patch = next(s.patch for s in self.spec.streams if s.name == VIDEO)
        assert patch is not None
        cells = codec.latent_shape(shape.num_frames, shape.height, shape.width)
        latents = unpatchify(tokens, patch_grid((codec.latent_channels, *cells), patch), patch)
        return codec.decode(latents.to(torch.float32)).cpu()

    def _pack(self, prompt: str, index: int, shape: ClipShape) -> TokenBatch:
        """A pack of one segment whose video latents are zeros of the right shape."""
        codec = self.encoder.video_codec
        grid = codec.latent_shape(shape.num_frames, shape.height, shape.width)
        text, conditions = self.encoder.text(prompt)
        encoded = EncodedSample(
            key=SampleKey(step=0, slot=index, sample="prompt"),
            latents={VIDEO: torch.zeros(codec.latent_channels, *grid)},
            seconds={VIDEO: codec.stride[0] / shape.fps},
            text=text,
            conditions=conditions,
        )
        return pack([encoded], self.spec)
