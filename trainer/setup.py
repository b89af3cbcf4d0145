"""What a run is made of, built in the order a reader expects: encoders, model, engine, averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kinodit.data.encode import SampleEncoder
from kinodit.data.packing import PackSpec, patch_grid
from kinodit.data.sound import num_audio_samples
from kinodit.data.tasks import TaskConfig, TaskMix
from kinodit.models.diffusion.objective import Objective, TokenShape, build_objective
from kinodit.models.mmdit import MMDiT, MMDiTConfig
from kinodit.trainer.batches import fit_model, pack_spec
from kinodit.trainer.config import RunConfig
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.build import build_engine
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.generate import ClipShape, Generator
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.upcycle import UpcycleConfig, starting_values


@dataclass
class Parts:
    """Everything of a run that does not depend on its position."""

    encoder: SampleEncoder
    pack_spec: PackSpec
    model_config: MMDiTConfig
    objective: Objective
    engine: Engine
    emas: dict[str, Ema]
    mesh: Mesh
    tasks: Mapping[str, TaskConfig]

    def generator(
        self, dtype: torch.dtype, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Generator:
        """Draws clips with this run's model, shared out over the ranks.

        `progress`: as of `Generator`
        """
        return Generator(
            engine=self.engine,
            objective=self.objective,
            encoder=self.encoder,
            spec=self.pack_spec,
            dtype=dtype,
            rank=self.mesh.dp_index,
            num_ranks=self.mesh.dp_size,
            tasks=self.tasks,
            progress=progress,
        )


def build_parts(
    config: RunConfig,
    mesh: Mesh,
    encoder: SampleEncoder,
    upcycle: UpcycleConfig | None = None,
) -> Parts:
    """Model, objective, engine and averages for the given encoders. Collective.

    `upcycle`: what weights start from; None where a checkpoint is going to be loaded.
    """
    spec = pack_spec(list(config.model.streams), encoder.encoders, config.modalities.video.patch)
    model_config = fit_model(config.model, spec)
    shapes = {
        name: TokenShape(stream.in_channels, model_config.stream_width(name))
        for name, stream in model_config.streams.items()
        if stream.output
    }
    objective = build_objective(config.objective, shapes)
    with torch.device("meta"):
        model = MMDiT(model_config)
    wish = engine_wish(config, mesh.world_size, mesh.device)
    values = starting_values(upcycle or UpcycleConfig(), model_config, config.run.seed, mesh)
    engine = build_engine(model, values, mesh, wish)
    emas = {name: Ema(ema, engine) for name, ema in config.ema.items()}
    return Parts(encoder, spec, model_config, objective, engine, emas, mesh, config.tasks)


def engine_wish(config: RunConfig, world_size: int, device: torch.device) -> Wish:
    """What the recipe asks of its engine on so many processes."""
    return Wish(
        config.engine,
        config.optim,
        config.parallel,
        config.precision,
        config.remat,
        world_size,
        device.type,
        torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
    )


def clip_shape(config: RunConfig) -> ClipShape:
    """The clips that the recipe trains on; a picture has no sound."""
    data = config.data
    has_sound = data.use_audio and (data.num_frames > 1 or not data.use_video)
    num_samples = num_audio_samples(data) if has_sound else 0
    return ClipShape(data.num_frames, data.height, data.width, data.fps, num_samples)


def sampling_shift(config: RunConfig, parts: Parts) -> float:
    """The time grid's shift: that of training, for a clip of the recipe's shape."""
    grids = parts.generator(torch.float32).grids(clip_shape(config))
    num_tokens = sum(
        math.prod(patch_grid((stream.channels, *grids[stream.name]), stream.patch))
        for stream in parts.pack_spec.streams
        if stream.patch is not None and stream.name in grids
    )
    shift = getattr(config.objective, "shift", None)
    return 1.0 if shift is None else float(shift.factor(num_tokens))


def task_mix(config: RunConfig, encoder: SampleEncoder, seed: int) -> TaskMix | None:
    """The recipe's tasks, drawn by `seed`; None if it has none."""
    if not config.tasks:
        return None
    return TaskMix(config.tasks, seed, lambda: encoder.text(""))


def outputs(model: MMDiTConfig) -> list[str]:
    """The streams that are generated, in the model's order."""
    return [name for name, stream in model.streams.items() if stream.output]


def master_dtype(config: RunConfig) -> torch.dtype:
    """dtype in which latents are noised and velocities integrated: at least float32."""
    return torch.promote_types(config.precision.compute_dtype, torch.float32)
