"""What a step holds, from the recipe alone: no data is opened, and no weights are needed.

Every clip is taken as the recipe's, every caption as long as the encoder lets it be: the most that
a step can hold.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kinodit.data.packing import PackSpec, StreamSpec
from kinodit.data.sound import num_audio_samples
from kinodit.data.tasks import pooled_name
from kinodit.models.config import MMDiTConfig
from kinodit.models.encoders.audio_vae import AudioVaeConfig
from kinodit.models.encoders.base import (
    AudioCodec,
    EncoderError,
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

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Given:
    """What the command line says instead of the recipe; None: as the recipe has it.

    codec:        (frames, rows, columns of pixels in a latent cell, latent channels)
    video_tokens: of one clip
    text_tokens:  of one caption
    segments:     samples in a pack
    encoder_gib:  memory of both encoders
    """

    codec: tuple[int, int, int, int] | None = None
    video_tokens: int | None = None
    text_tokens: int | None = None
    segments: int | None = None
    encoder_gib: float | None = None

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

    tokens:        stream -> tokens of one sample
    levels:        noise levels of one sample
    encoder_bytes: weights of text encoder and codec, which every rank has
    notes:         what was assumed
    """

    model: MMDiTConfig
    tokens: Mapping[str, int]
    segments: int
    packs: int
    levels: int = 1
    encoder_bytes: int = 0
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
    if VIDEO in config.model.streams:
        tokens[VIDEO], channels = _video(config, given, notes)
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
        encoder_bytes = _encoder_bytes(config, notes)
    else:
        encoder_bytes = round(given.encoder_gib * 2**30)
    if config.engine.compile:
        notes.append(
            "engine.compile fuses pointwise work, which then keeps and moves less: activations and "
            "time are those without it, the most that they can be"
        )
    samples, packs = config.data.samples_per_step, config.data.packs_per_step
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
            for name in order
        },
        segments=given.segments or -(-samples // packs),
        packs=packs,
        encoder_bytes=encoder_bytes,
        notes=tuple(notes),
    )


def _video(config: RunConfig, given: Given, notes: list[str]) -> tuple[int, int]:
    """(tokens of a clip, latent channels)."""
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
    pictures = data.max_references * (grid[1] // patch[1]) * (grid[2] // patch[2])
    return given.video_tokens or math.prod(grid) // math.prod(patch) + pictures, channels


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
    if isinstance(codec, AudioVaeConfig) and not _is_here(codec.path, None):
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
    if isinstance(codec, DiffusersVaeConfig) and not _is_here(codec.path, None):
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
    if not _is_here(encoder.path, encoder.package):
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


def _is_here(path: str | None, package: str | None) -> bool:
    try:
        weights_folder(path, package, "an encoder")
    except EncoderError:
        return False
    return True


def _encoder_bytes(config: RunConfig, notes: list[str]) -> int:
    """Weights of the encoders in the formats that they are loaded in."""
    modalities, streams = config.modalities, config.model.streams
    named: list[tuple[str, object]] = [
        ("text encoder" if name == TEXT else f"text encoder {name}", encoder)
        for name, encoder in modalities.text.all.items()
    ]
    named += [("video codec", modalities.video.codec)] if VIDEO in streams else []
    named += [("audio codec", modalities.audio.codec)] if AUDIO in streams else []
    total, missing = 0, []
    parts: Iterable[tuple[str, str | None, str | None, str]] = [
        (name, part.path, getattr(part, "package", None), part.dtype)
        for name, part in named
        if isinstance(part, TransformersTextConfig | DiffusersVaeConfig | AudioVaeConfig)
    ]
    for name, path, package, dtype in parts:
        if _is_here(path, package):
            total += _numbers_in(weights_folder(path, package, name)) * ITEM_BYTES[dtype]
        else:
            missing.append(name)
    if missing:
        notes.append(f"weights of the {' and the '.join(missing)} count as 0 (--encoder-gib)")
    return total


def _numbers_in(folder: Path) -> int:
    """Numbers in the folder's safetensors, by their headers."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header: dict[str, Any] = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise ConfigError(f"cannot read the header of {file}: {error}") from error
        total += sum(
            math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        )
    return total
