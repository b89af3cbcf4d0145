"""Clips and sounds from prompts: each prompt is its own pack, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kinodit.data.encode import AUDIO, IMAGE, TEXT, VIDEO, SampleEncoder
from kinodit.data.packing import PackSpec
from kinodit.data.region import pixels_of
from kinodit.data.tasks import DrawnTask, RegionConfig, TaskConfig
from kinodit.models.diffusion.guidance import GuidanceConfig
from kinodit.models.diffusion.objective import Objective
from kinodit.models.diffusion.samplers import SamplerConfig
from kinodit.models.diffusion.windows import WindowConfig
from kinodit.models.errors import ConfigError
from kinodit.models.moe.cache import cached_experts
from kinodit.trainer.drawing import Drawing, Order
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine


@dataclass(frozen=True)
class SampleConfig:
    """Clips drawn during training, and the defaults of `kinodit sample`.

    every_steps:  0 = never
    prompts:      one clip each
    ema:          name of the average to sample with, "" = the parameters as they are
    sound_format: of files of sound, which are written beside clips that have it
    task:         which of the recipe's tasks to draw; "": everything from the prompt
    given:        a file that has what the task is given: a picture (held for the whole clip), a
                  clip, or a sound
    window:       a longer clip is drawn in overlapping windows; its prompt may be several, "|"
                  between them, that follow each other
    negative:     what clips are guided away from: the caption of the pass without the prompt
    references:   files of the pictures that a clip is drawn after, in their order
    region:       what of the given file the task takes, where its recipe leaves that open
    """

    every_steps: int = 0
    prompts: tuple[str, ...] = ()
    seed: int = 0
    ema: str = ""
    sound_format: Literal["wav", "flac"] = "wav"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    task: str = ""
    given: str = ""
    window: WindowConfig = field(default_factory=WindowConfig)
    negative: str = ""
    references: tuple[str, ...] = ()
    region: RegionConfig = field(default_factory=RegionConfig)

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"sample.every_steps={self.every_steps}: must not be negative")
        scales = (self.guidance.scale, *self.guidance.scales.values())
        if self.negative and all(scale == 1 for scale in scales):
            raise ConfigError(
                f"sample.negative={self.negative!r} is the caption of the pass without the prompt, "
                "which sample.guidance.scale=1 leaves out: set another scale, or no negative prompt"
            )


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
    given: bool [T, H, W], which pixels of a generated video the task gave; None: no task
    task:  its name; "": none
    pictures: [R, H, W, 3], drawn together with it as a group, or those that it was drawn after;
              None: it was drawn alone
    """

    index: int
    prompt: str
    seed: int
    fps: float
    video: Tensor | None
    sound: Tensor | None = None
    rate_hz: int = 0
    given: Tensor | None = None
    pictures: Tensor | None = None
    task: str = ""

    @property
    def is_given_in_part(self) -> bool:
        """Whether the task gave a part of its video, and not all of it."""
        return self.given is not None and bool(self.given.any()) and not bool(self.given.all())


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


Progress = Callable[[int, int], None]
"""Is given how much is done, and of how much."""


def _counter(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    """What counts steps of one clip among those of all, `before` of which are done."""
    return lambda done: progress(before + done, total)


@dataclass
class Generator:
    """Draws clips with a model under any engine.

    progress: of the steps of the time grid, those of all of this rank's clips together
    """

    engine: Engine
    objective: Objective
    encoder: SampleEncoder
    spec: PackSpec
    dtype: torch.dtype
    rank: int
    num_ranks: int
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    progress: Progress = lambda done, total: None

    def __call__(
        self,
        prompts: Sequence[str],
        shape: ClipShape,
        config: SampleConfig,
        shift: float,
        given: Sequence[Mapping[str, Tensor]] = (),
        references: Sequence[Sequence[Tensor]] = (),
    ) -> list[Clip]:
        """This rank's clips: prompts rank, rank + num_ranks, ...

        Ranks that share packs have equal `rank`, and draw the same clips together.

        Collective: a rank that has run out of prompts goes on with empty packs, so that all ranks
        make the same number of forward passes. A clip's noise depends on seed, prompt and the
        prompt's place alone, so it is bit-equal on any number of ranks.

        given: of each prompt, stream -> latents [C, t, h, w] that a task takes what it is given
               from; one serves all prompts, and without any nothing is given
        references: of each prompt, latents [C, 1, h, w] of the pictures that it is given, or of the
               same shapes, of a task that draws them as a group; one serves all

        Raises:
            ConfigError: there is no task of the name in `config`.
        """
        clips = []
        order = Order(
            None,
            0,
            self.grids(shape),
            self.encoder.encoders.seconds(shape.fps),
            self._task(config),
            seed=config.seed,
        )
        rounds = -(-len(prompts) // self.num_ranks)
        with self.engine.inference() as forward, cached_experts(self.engine.model):
            draw = Drawing(
                forward,
                self.engine.model,
                self.objective,
                self.encoder,
                self.spec,
                self.engine.device,
                self.dtype,
                config.sampler,
                config.guidance,
                config.window,
                shift,
                config.negative,
            )
            steps = config.sampler.steps
            for turn in range(rounds):
                draw.tell = _counter(self.progress, turn * steps, rounds * steps)
                draw.tell(0)
                index = turn * self.num_ranks + self.rank
                prompt = prompts[index] if index < len(prompts) else None
                own = given[index % len(given)] if given else {}
                pictures = references[index % len(references)] if references else ()
                wish = replace(
                    order,
                    prompt=prompt,
                    index=index,
                    given=own,
                    references={self._pictured(shape): pictures} if pictures else {},
                )
                made = draw(wish)
                if prompt is not None:
                    clip = self._clip(made, prompt, index, shape, config.seed)
                    pixels = self._given_pixels(draw.given_cells(wish), clip)
                    clips.append(replace(clip, given=pixels, task=config.task))
        self.progress(rounds * steps, rounds * steps)
        return clips

    def _clip(
        self, latents: Mapping[str, Tensor], prompt: str, index: int, shape: ClipShape, seed: int
    ) -> Clip:
        """Latents turned into pixels and sound, on the host."""
        encoders = self.encoder.encoders
        video = sound = None
        stream = self._pictured(shape)
        if stream in latents:
            assert encoders.video is not None
            video = encoders.video.decode(latents[stream].to(torch.float32)).cpu()
        names = [name for name in latents if name.startswith(f"{stream}/")]
        pictures = None
        if names:
            assert encoders.video is not None
            each = [encoders.video.decode(latents[name].to(torch.float32)).cpu() for name in names]
            pictures = torch.cat(each)
        rate_hz = 0
        if AUDIO in latents:
            assert encoders.audio is not None
            sound = encoders.audio.decode(latents[AUDIO].to(torch.float32)).cpu()
            sound = sound[:, : shape.num_samples]
            rate_hz = encoders.audio.format.rate_hz
        return Clip(index, prompt, seed, shape.fps, video, sound, rate_hz, pictures=pictures)

    def _given_pixels(self, cells: Mapping[str, Tensor], clip: Clip) -> Tensor | None:
        """Bool [T, H, W] of the cells of its video that a task gave."""
        if VIDEO not in cells or clip.video is None:
            return None
        assert self.encoder.encoders.video is not None
        num_frames, height, width, _ = clip.video.shape
        stride = self.encoder.encoders.video.stride[0]
        return pixels_of(cells[VIDEO], (num_frames, height, width), stride)

    def _task(self, config: SampleConfig) -> DrawnTask | None:
        """The task that is asked for, with nothing dropped; what it leaves open is drawn."""
        if not config.task:
            if config.region != RegionConfig():
                raise ConfigError(
                    "sample.region is a part of what a task is given, but there is no task: set "
                    "sample.task, or leave the region out"
                )
            return None
        if config.task not in self.tasks:
            raise ConfigError(
                f"sample.task={config.task}: there is no such task; the recipe has "
                f"{', '.join(self.tasks) or 'none'}"
            )
        try:
            task = config.region.of(self.tasks[config.task])
        except ConfigError as error:
            raise ConfigError(f"sample.region.{error} (sample.task={config.task})") from error
        if config.negative and task.stream(TEXT, True).use == "absent":
            raise ConfigError(
                f"sample.negative={config.negative!r} with sample.task={config.task}, which has no "
                "text: leave one of them out"
            )
        streams = {name: replace(stream, dropout=0.0) for name, stream in task.streams.items()}
        return DrawnTask(config.task, replace(task, streams=streams), config.seed)

    def _pictured(self, shape: ClipShape) -> str:
        """The stream of its pictures."""
        return IMAGE if self.encoder.encoders.has_image and shape.num_frames == 1 else VIDEO

    def grids(self, shape: ClipShape) -> dict[str, tuple[int, int, int]]:
        """Stream -> latent frames, rows and columns; a stream that the clip lacks is left out."""
        encoders, grids = self.encoder.encoders, {}
        if encoders.video is not None:
            grid = encoders.video.latent_shape(shape.num_frames, shape.height, shape.width)
            grids[self._pictured(shape)] = grid
        if encoders.audio is not None and shape.num_samples:
            grids[AUDIO] = encoders.num_audio_frames(shape.num_samples), 1, 1
        return grids
