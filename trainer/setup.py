"""What a run is made of, built in the order a reader expects: encoders, model, engine, averages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kinodit.data.encode import SampleEncoder
from kinodit.data.packing import PackSpec
from kinodit.data.tasks import TaskMix
from kinodit.models.diffusion.objective import Objective, TokenShape, build_objective
from kinodit.models.encoders.base import VideoCodec, VideoCodecConfig
from kinodit.models.encoders.wavelet import WaveletConfig
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

CODEC_FILE = "codec.json"
"""Measured statistics of the codec, in the run folder: sampling needs what training used."""


@dataclass
class Parts:
    """Everything of a run that does not depend on its position."""

    codec: VideoCodec
    encoder: SampleEncoder
    pack_spec: PackSpec
    model_config: MMDiTConfig
    objective: Objective
    engine: Engine
    emas: dict[str, Ema]
    mesh: Mesh

    def generator(self, dtype: torch.dtype) -> Generator:
        """Draws clips with this run's model, shared out over the ranks."""
        return Generator(
            engine=self.engine,
            objective=self.objective,
            encoder=self.encoder,
            spec=self.pack_spec,
            dtype=dtype,
            rank=self.mesh.dp_index,
            num_ranks=self.mesh.dp_size,
        )


def build_codec(config: VideoCodecConfig, run_dir: Path, device: torch.device) -> VideoCodec:
    """The codec of a run; a wavelet without statistics of its own takes those the run measured."""
    measured = run_dir / CODEC_FILE
    if isinstance(config, WaveletConfig) and config.standardisation is None and measured.is_file():
        config = replace(config, standardisation=str(measured))
    return config.build(device)


def build_parts(
    config: RunConfig,
    mesh: Mesh,
    encoder: SampleEncoder,
    codec: VideoCodec,
    upcycle: UpcycleConfig | None = None,
) -> Parts:
    """Model, objective, engine and averages for the given encoders. Collective.

    `upcycle`: what weights start from; None where a checkpoint is going to be loaded.
    """
    spec = pack_spec(encoder.text_encoder, codec, config.modalities.video.patch)
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
    return Parts(codec, encoder, spec, model_config, objective, engine, emas, mesh)


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
    """The clips that the recipe trains on."""
    data = config.data
    return ClipShape(data.num_frames, data.height, data.width, data.fps)


def sampling_shift(config: RunConfig, parts: Parts) -> float:
    """The time grid's shift: that of training, for a clip of the recipe's shape."""
    shape = clip_shape(config)
    grid = parts.codec.latent_shape(shape.num_frames, shape.height, shape.width)
    patch = config.modalities.video.patch
    num_tokens = grid[0] * grid[1] * grid[2] // (patch[0] * patch[1] * patch[2])
    shift = getattr(config.objective, "shift", None)
    return 1.0 if shift is None else float(shift.factor(num_tokens))


def task_mix(config: RunConfig, encoder: SampleEncoder, seed: int) -> TaskMix | None:
    """The recipe's tasks, drawn by `seed`; None if it has none."""
    if not config.tasks:
        return None
    return TaskMix(config.tasks, seed, lambda: encoder.text(""))


def master_dtype(config: RunConfig) -> torch.dtype:
    """dtype in which latents are noised and velocities integrated: at least float32."""
    return torch.promote_types(config.precision.compute_dtype, torch.float32)
