"""The encoders of a run with their statistics, and what its data plan has to know of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kinodit.data.encode import IMAGE, Encoders, pooled_name
from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.select import plan_spec
from kinodit.data.shapes import grid_of
from kinodit.data.sound import num_audio_samples
from kinodit.data.spec import CostModel
from kinodit.models.encoders.base import (
    EncoderError,
    SoundFormat,
    VideoCodec,
    VideoCodecConfig,
    build_audio_codec,
    build_text_encoder,
)
from kinodit.models.encoders.wavelet import WaveletCodec, WaveletConfig, fit_standardisation
from kinodit.models.errors import ConfigError
from kinodit.models.flops import forward_flops
from kinodit.models.mmdit import MMDiTConfig
from kinodit.trainer.batches import AUDIO, VIDEO
from kinodit.trainer.config import RunConfig
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.resilience import pulse

CODEC_FILE = "codec.json"
"""Measured statistics of the video codec, in the run folder: sampling needs what training used."""
NUM_CODEC_SAMPLES = 64


def build_encoders(config: RunConfig, run_dir: Path, device: torch.device) -> Encoders:
    """The encoders of the model's streams, with the statistics that the run in `run_dir` has.

    Raises:
        ConfigError: the model's streams are not those that the data brings.
        EncoderError: an encoder cannot be built, or takes another kind of sound.
    """
    streams, data = config.model.streams, config.data
    if IMAGE in streams and VIDEO not in streams:
        raise ConfigError(
            f"model.streams has {IMAGE!r}, which is for still images beside clips, but no "
            f"{VIDEO!r}: add it, or call the stream {VIDEO!r}, an image alone being a clip of one "
            "frame"
        )
    if IMAGE in streams and config.modalities.video.patch[0] > 1:
        raise ConfigError(
            f"modalities.video.patch={list(config.modalities.video.patch)} joins latent frames, of "
            f"which an image has one: set its first number to 1, or leave {IMAGE!r} out of "
            "model.streams"
        )
    for stream, key, used in (
        (VIDEO, "use_video", data.use_video),
        (AUDIO, "use_audio", data.use_audio),
    ):
        if used != (stream in streams):
            change = (
                f"name {stream!r} among them, or set data.{key}=false"
                if used
                else f"set data.{key}=true, or leave {stream!r} out of them"
            )
            raise ConfigError(
                f"data.{key} is {str(used).lower()}, but model.streams are {', '.join(streams)}: "
                + change
            )
    idle = [name for name in config.modalities.text.more if not config.uses_text(name)]
    if idle:
        raise ConfigError(
            f"modalities.text.more.{idle[0]} is neither a stream of the model nor a condition: add "
            f"model.streams.{idle[0]} (output: false), or model.conditions.{pooled_name(idle[0])}"
        )
    modalities, sound = config.modalities, SoundFormat(data.audio_rate, data.audio_channels)
    return Encoders(
        text=build_text_encoder(modalities.text.encoder, device),
        video=_video_codec(modalities.video.codec, run_dir, device) if VIDEO in streams else None,
        audio=(
            build_audio_codec(modalities.audio.codec, device, sound) if AUDIO in streams else None
        ),
        audio_patch=modalities.audio.patch,
        has_image=IMAGE in streams,
        more={name: build_text_encoder(e, device) for name, e in modalities.text.more.items()},
    )


def _video_codec(config: VideoCodecConfig, run_dir: Path, device: torch.device) -> VideoCodec:
    """The codec of a run; a wavelet without statistics of its own takes those the run measured."""
    measured = run_dir / CODEC_FILE
    if isinstance(config, WaveletConfig) and config.standardisation is None and measured.is_file():
        config = dataclasses.replace(config, standardisation=str(measured))
    return config.build(device)


def fitted_encoders(
    config: RunConfig, run_dir: Path, datasets: dict[str, Dataset], mesh: Mesh
) -> Encoders:
    """The encoders; statistics that a codec lacks are measured by rank 0 and kept with the run."""
    encoders = build_encoders(config, run_dir, mesh.device)
    codec = encoders.video
    if isinstance(codec, WaveletCodec) and codec.standardisation is None:
        unfitted = codec

        def measure() -> None:
            videos = _first_videos(config, datasets, cost_model(config, encoders))
            fitted = fit_standardisation(unfitted, videos)
            assert fitted.standardisation is not None
            fitted.standardisation.save(run_dir / CODEC_FILE)

        mesh.from_main(measure)
        measured = _video_codec(config.modalities.video.codec, run_dir, mesh.device)
        encoders = dataclasses.replace(encoders, video=measured)
    return encoders


def _first_videos(
    config: RunConfig, datasets: dict[str, Dataset], cost: CostModel
) -> Sequence[Tensor]:
    """Clips of the first samples of the data order."""
    # The statistics are of pixels, whatever the run keeps them as.
    raw = {name: dataclasses.replace(d, cache="") for name, d in config.data.datasets.items()}
    data = dataclasses.replace(
        config.data,
        datasets=raw,
        pixels="rgb",
        samples_per_step=NUM_CODEC_SAMPLES,
        packs_per_step=1,
        packing="count",
        cost_budget=None,
        window_steps=1,
        token_budget=None,
        prefetch_steps=1,
    )
    spec = plan_spec(data, datasets, cost, config.run.seed)
    loader = Loader(spec, datasets, data, 0, 1, start_step=0, at_work=pulse.at_work())
    try:
        (pack,) = next(iter(loader)).packs
    finally:
        loader.close()
    return [sample.video for sample in pack if sample.video is not None]


def cost_model(config: RunConfig, encoders: Encoders) -> CostModel:
    """Tokens of a sample at most: what the plan balances and budgets."""
    parts = [encoder.fingerprint for encoder in encoders.all]
    texts = (e for name, e in encoders.texts.items() if name in config.model.streams)
    text_tokens, tokenizer = sum(encoder.max_tokens for encoder in texts), " ".join(parts)
    if encoders.video is None:
        parity = parity_tokens(config.model) if config.data.packing != "count" else 0
        cost = CostModel(0, 0, text_tokens=text_tokens, tokenizer=tokenizer, parity_tokens=parity)
    else:
        video = encoders.video
        cost = cost_of_latents(config, video.latent_shape, video.stride, text_tokens, tokenizer)
    if encoders.audio is None:
        return cost
    growth = max((task.most_tokens for task in config.tasks.values()), default=1)
    num_frames = encoders.num_audio_frames(num_audio_samples(config.data))
    return dataclasses.replace(cost, audio_tokens=growth * (num_frames // encoders.audio_patch))


def cost_of_latents(
    config: RunConfig,
    latent_shape: Callable[[int, int, int], tuple[int, int, int]],
    stride: tuple[int, int, int],
    text_tokens: int,
    tokenizer: str = "",
) -> CostModel:
    """The cost model of a codec of which the shapes are known.

    latent_shape: the latent grid of (frames, height, width); EncoderError if they do not fit
    stride:       pixels in a latent cell along frames, rows and columns
    """
    data, (pt, ph, pw) = config.data, config.modalities.video.patch

    growth = max((task.most_tokens for task in config.tasks.values()), default=1)
    pictures = data.max_references  # of the sample's own size, one latent frame each

    def tokens(num_frames: int, height: int, width: int) -> int | None:
        try:
            t, h, w = latent_shape(num_frames, height, width)
        except EncoderError:
            return None
        return (growth * t * h * w + pictures * h * w) // (pt * ph * pw)

    latent_shape(data.num_frames, data.height, data.width)  # the recipe's own size must fit
    if pictures and tokens(1, data.height, data.width) is None:
        raise ConfigError(
            f"data.max_references={pictures}: the video codec takes no single pictures; set its "
            "first_frame_alone=true, or data.max_references=0"
        )
    tile = stride[1] * ph, stride[2] * pw

    def layers(num_frames: int) -> int | None:
        try:
            t = latent_shape(num_frames, *tile)[0]
        except EncoderError:
            return None
        return None if t % pt else growth * t // pt + pictures

    return CostModel(
        video_tokens=tokens(data.num_frames, data.height, data.width) or 0,
        image_tokens=tokens(1, data.height, data.width),  # None: the plan refuses still images
        text_tokens=text_tokens,
        tokenizer=tokenizer,
        grid=(
            grid_of(layers, data.num_frames, tile, data.lengths, data.side_multiple)
            if data.sizes == "own"
            else None
        ),
        parity_tokens=parity_tokens(config.model) if data.packing != "count" else 0,
    )


def parity_tokens(model: MMDiTConfig) -> int:
    """Length of a sample at which joint attention takes as many FLOPs as all else for its clip.

    Without a stream of video, for the tokens of the first stream that is generated.
    """
    outputs = [name for name, stream in model.streams.items() if stream.output]
    stream = VIDEO if VIDEO in outputs else outputs[0]
    none = dict.fromkeys(model.streams, 0)
    many = 1 << 20
    at_rest = forward_flops(model, none, 0, 1, 1)
    rest = forward_flops(model, {**none, stream: many}, 0, 1, 1) - at_rest
    attention = forward_flops(model, none, many, 1, 1) - at_rest
    return max(1, round(rest / attention))
