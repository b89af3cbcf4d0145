"""What a step holds, from the recipe alone: no data is opened, and no weights are needed.

Every clip is taken as the recipe's, every caption as long as the encoder lets it be: the most that
a step can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from kinodit.data.packing import PackSpec, StreamSpec
from kinodit.data.sound import num_audio_samples
from kinodit.data.tasks import pooled_name
from kinodit.launch.plan.frozen import FrozenWeights, frozen_weights, is_here
from kinodit.models.config import MMDiTConfig
from kinodit.models.encoders.audio_vae import AudioVaeConfig
from kinodit.models.encoders.base import (
    AudioCodec,
    SoundFormat,
    TextEncoderConfig,
    VideoCodec,
    grid_shape,
)
from kinodit.models.encoders.byte_text import ByteTextConfig
from kinodit.models.encoders.folder import read_json, weights_folder
from kinodit.models.encoders.text import TransformersTextConfig
from kinodit.models.encoders.video_vae import DiffusersVaeConfig
from kinodit.models.encoders.wavelet import WaveletConfig
from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.models.flops import forward_flops
from kinodit.trainer.batches import AUDIO, IMAGE, TEXT, VIDEO, fit_model
from kinodit.trainer.config import RunConfig


@dataclass(frozen=True)
class Given:
    """What the command line says instead of the recipe; None: as the recipe has it.

    codec:        (frames, rows, columns of pixels in a latent cell, latent channels)
    video_tokens: of one clip
    text_tokens:  of one caption
    segments:     samples in a pack
    encoder_gib:  memory of both encoders
    pictures:     reference pictures in a pack
    """

    codec: tuple[int, int, int, int] | None = None
    video_tokens: int | None = None
    text_tokens: int | None = None
    segments: int | None = None
    encoder_gib: float | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        for name in ("video_tokens", "text_tokens", "segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.encoder_gib is not None and not 0 <= self.encoder_gib < math.inf:
            raise ConfigError(f"--encoder-gib {self.encoder_gib:g}: must not be negative")


ASSUMED_CODEC = (4, 8, 8, 16)
"""Of a video autoencoder whose folder is not here: that of Wan 2.1 and HunyuanVideo."""


ASSUMED_AUDIO_CODEC = (2048, 64)
"""(samples a latent frame, latent channels) of an audio autoencoder that is not here: Oobleck's."""


@dataclass(frozen=True)
class Workload:
    """A step: `packs` of `segments` samples each, and the model that computes them.

    tokens: stream -> tokens of one sample
    levels: noise levels of one sample
    frozen: weights of the encoders
    notes:  what was assumed
    """

    model: MMDiTConfig
    tokens: Mapping[str, int]
    segments: int
    packs: int
    levels: int = 1
    frozen: FrozenWeights = field(default_factory=FrozenWeights)
    notes: tuple[str, ...] = ()

    def of_pass(self, merged: int) -> Workload:
        """The same for forward passes over `merged` packs each."""
        return replace(self, segments=self.segments * merged, packs=-(-self.packs // merged))

    def noting(self, note: str) -> Workload:
        """The same with one more note."""
        return replace(self, notes=(*self.notes, note))

    @property
    def pack_tokens(self) -> dict[str, int]:
        """Stream -> tokens of a pack."""
        return {name: count * self.segments for name, count in self.tokens.items()}

    @property
    def attention_flops(self) -> int:
        """Of one forward over one pack: scores and their products with values."""
        pairs = self.segments * sum(self.tokens.values()) ** 2
        blocks = self.model.num_double_blocks + self.model.num_single_blocks
        return blocks * 4 * pairs * self.model.num_heads * self.model.dim_of_head

    @cached_property
    def flops(self) -> int:
        """Of one forward over one pack."""
        pairs = self.segments * sum(self.tokens.values()) ** 2
        levels = self.segments * self.levels
        return forward_flops(self.model, self.pack_tokens, pairs, self.segments, levels)


def read_workload(config: RunConfig, given: Given) -> Workload:
    """The workload of a recipe.

    Raises:
        ConfigError: clips, codec, patch or model do not fit each other.
    """
    notes: list[str] = []
    tokens, streams, pooled = {}, {}, {}
    for name, encoder in config.modalities.text.all.items():
        count, width, dim = text_sizes(config, given, notes, name, encoder)
        pooled[pooled_name(name)] = dim
        if name == TEXT or name in config.model.streams:
            tokens[name], streams[name] = count, StreamSpec(name, width)
    samples, packs = config.data.samples_per_step, config.data.packs_per_step
    segments, pictures = given.segments or -(-samples // packs), 0
    if VIDEO in config.model.streams:
        tokens[VIDEO], of_picture, channels = _video(config, given, notes)
        in_pack = segments * config.data.max_references
        if given.pictures is not None:
            in_pack = min(in_pack, given.pictures)
        elif in_pack:
            notes.append(
                "the datasets are not on this machine: every sample is taken with data."
                f"max_references={config.data.max_references} reference pictures, the most that it "
                "can have"
            )
        pictures = -(-in_pack * of_picture // segments)
        streams[VIDEO] = StreamSpec(VIDEO, channels, config.modalities.video.patch)
        if IMAGE in config.model.streams:
            # A sample has either; it is taken as a clip, the most that it can be.
            tokens[IMAGE], streams[IMAGE] = 0, replace(streams[VIDEO], name=IMAGE)
    if AUDIO in config.model.streams:
        tokens[AUDIO], channels = audio_sizes(config, notes)
        streams[AUDIO] = StreamSpec(AUDIO, channels, (config.modalities.audio.patch, 1, 1))
    order = [name for name in config.model.streams if name in streams]
    order += [name for name in streams if name not in order]
    spec = PackSpec(tuple(streams[name] for name in order), pooled)
    if given.encoder_gib is None:
        frozen = frozen_weights(config, notes)
    else:
        frozen = FrozenWeights(round(given.encoder_gib * 2**30))
    if config.engine.compile:
        notes.append(
            "engine.compile fuses pointwise work, which then keeps and moves less: activations and "
            "time are those without it, the most that they can be"
        )
    if packs > samples:
        raise ConfigError(
            f"data.packs_per_step is {packs} with data.samples_per_step {samples}: every pack "
            f"needs a sample, so make it at most {samples}"
        )
    growth = max((task.most_tokens for task in config.tasks.values()), default=1)
    if growth > 1:
        notes.append(
            "tasks with block_s hold blocks twice, clean and noised: every sample is taken as "
            "such, and its attention as full, the most that they can be"
        )
    return Workload(
        model=fit_model(config.model, spec),
        tokens={
            name: tokens[name] * (1 if name in config.modalities.text.all else growth)
            + (pictures if name == VIDEO else 0)
            for name in order
        },
        segments=segments,
        packs=packs,
        frozen=frozen,
        notes=tuple(notes),
    )


def _video(config: RunConfig, given: Given, notes: list[str]) -> tuple[int, int, int]:
    """(tokens of a clip, of a reference picture, latent channels)."""
    data, patch = config.data, config.modalities.video.patch
    size = (data.num_frames, data.height, data.width)
    shapes = codec_shapes(config, given, notes)
    grid, channels = shapes.latent_shape(*size), shapes.channels
    if any(cells % step for cells, step in zip(grid, patch, strict=True)):
        raise ConfigError(
            f"latents of {' x '.join(map(str, grid))} (frames, rows, columns) do not divide into "
            f"modalities.video.patch={list(patch)}: change data.num_frames, height or width, or "
            "the patch"
        )
    # What is said of a clip on the command line is said of its pictures as well.
    of_picture = 0 if given.video_tokens else (grid[1] // patch[1]) * (grid[2] // patch[2])
    return given.video_tokens or math.prod(grid) // math.prod(patch), of_picture, channels


def audio_sizes(config: RunConfig, notes: list[str]) -> tuple[int, int]:
    """(tokens of a clip's sound, latent channels)."""
    patch = config.modalities.audio.patch
    codec = _audio_codec_here(config)
    hop, channels = (codec.hop, codec.latent_channels) if codec else ASSUMED_AUDIO_CODEC
    if codec is None:
        notes.append(
            f"the audio codec is not on this machine: taken as {hop} samples a latent frame, "
            f"{channels} channels"
        )
    return -(-num_audio_samples(config.data) // (hop * patch)), channels


def _audio_codec_here(config: RunConfig) -> AudioCodec | None:
    codec, data = config.modalities.audio.codec, config.data
    if isinstance(codec, AudioVaeConfig) and not is_here(codec.path, None):
        return None
    try:
        return codec.build(torch.device("cpu"), SoundFormat(data.audio_rate, data.audio_channels))
    except MissingExtraError:
        return None


@dataclass(frozen=True)
class CodecShapes:
    """Shapes of a video codec.

    latent_shape: (frames, height, width) -> the latent grid; EncoderError if they do not fit
    stride:       frames, rows and columns of pixels in a latent cell
    channels:     of a latent cell
    """

    latent_shape: Callable[[int, int, int], tuple[int, int, int]]
    stride: tuple[int, int, int]
    channels: int


def codec_shapes(config: RunConfig, given: Given, notes: list[str]) -> CodecShapes:
    """Shapes of the recipe's codec, or of what is assumed in its place, which `notes` then says."""
    codec = None if given.codec else _codec_here(config)
    if codec is not None:
        return CodecShapes(codec.latent_shape, codec.stride, codec.latent_channels)
    frames, rows, columns, channels = given.codec or ASSUMED_CODEC
    stride = frames, rows, columns
    if given.codec is None:
        shown = " x ".join(map(str, stride))
        notes.append(
            f"the video codec is not on this machine: taken as {shown} pixels a cell, "
            f"{channels} channels (--codec)"
        )

    def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return grid_shape((num_frames, height, width), stride, frames > 1)

    return CodecShapes(latent_shape, stride, channels)


def _codec_here(config: RunConfig) -> VideoCodec | None:
    """The codec if it can be built here; its shapes are wanted, never its statistics."""
    codec = config.modalities.video.codec
    host = torch.device("cpu")
    if isinstance(codec, WaveletConfig):
        return replace(codec, standardisation=None).build(host)
    if isinstance(codec, DiffusersVaeConfig) and not is_here(codec.path, None):
        return None
    try:
        return codec.build(host)
    except MissingExtraError:
        return None


def text_tokens(config: RunConfig, notes: list[str]) -> int:
    """Tokens of a caption in all text streams together, at most."""
    return sum(
        text_sizes(config, Given(), notes, name, encoder)[0]
        for name, encoder in config.modalities.text.all.items()
        if name == TEXT or name in config.model.streams
    )


def text_sizes(
    config: RunConfig, given: Given, notes: list[str], name: str, encoder: TextEncoderConfig
) -> tuple[int, int, int]:
    """(tokens of a caption, features of a token, length of the pooled vector) of one encoder."""
    if isinstance(encoder, ByteTextConfig):
        return given.text_tokens or encoder.max_tokens, encoder.dim, encoder.dim
    assert isinstance(encoder, TransformersTextConfig)
    tokens = given.text_tokens or encoder.max_tokens - encoder.skip_tokens
    if not is_here(encoder.path, encoder.package):
        stream = config.model.streams.get(name)
        pooled = config.model.conditions.get(pooled_name(name))
        width = stream.in_channels if stream else 1
        notes.append(
            f"the text encoder is not on this machine: taken as {width} features a token, as the "
            f"model's {name} stream has"
        )
        return tokens, width, pooled.dim if pooled else width
    folder = weights_folder(encoder.path, encoder.package, "text encoder 'transformers'")
    document = read_json(folder / "config.json")
    document = {**document, **(document.get("text_config") or {})}
    found = document.get("hidden_size") or document.get("d_model")
    if not isinstance(found, int):
        raise ConfigError(f"{folder / 'config.json'} has neither hidden_size nor d_model")
    wide = found * len(encoder.chosen)
    projected = "CLIPTextModelWithProjection" in (document.get("architectures") or [])
    pooled_dim = found if encoder.pooled == "model" else wide
    if encoder.pooled == "model" and projected:
        pooled_dim = int(document.get("projection_dim") or found)
    return tokens, wide, pooled_dim
