"""The video codec of a run with its statistics, and what its data plan has to know of encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.select import plan_spec
from kinodit.data.shapes import grid_of
from kinodit.data.spec import CostModel
from kinodit.models.encoders.base import EncoderError, TextEncoder, VideoCodec
from kinodit.models.encoders.wavelet import WaveletCodec, fit_standardisation
from kinodit.models.flops import forward_flops
from kinodit.models.mmdit import MMDiTConfig
from kinodit.trainer.batches import VIDEO
from kinodit.trainer.config import RunConfig
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.setup import CODEC_FILE, build_codec

NUM_CODEC_SAMPLES = 64


def fitted_codec(
    config: RunConfig,
    run_dir: Path,
    datasets: dict[str, Dataset],
    text: TextEncoder,
    mesh: Mesh,
) -> VideoCodec:
    """The codec; statistics that it lacks are measured by rank 0 and kept in the run's folder."""
    codec = build_codec(config.modalities.video.codec, run_dir, mesh.device)
    if isinstance(codec, WaveletCodec) and codec.standardisation is None:
        unfitted = codec

        def measure() -> None:
            videos = _first_videos(config, datasets, cost_model(config, unfitted, text))
            fitted = fit_standardisation(unfitted, videos)
            assert fitted.standardisation is not None
            fitted.standardisation.save(run_dir / CODEC_FILE)

        mesh.from_main(measure)
        codec = build_codec(config.modalities.video.codec, run_dir, mesh.device)
    return codec


def _first_videos(
    config: RunConfig, datasets: dict[str, Dataset], cost: CostModel
) -> Sequence[Tensor]:
    """Clips of the first samples of the data order."""
    data = dataclasses.replace(
        config.data,
        samples_per_step=NUM_CODEC_SAMPLES,
        packs_per_step=1,
        packing="count",
        cost_budget=None,
        window_steps=1,
        token_budget=None,
        prefetch_steps=1,
    )
    spec = plan_spec(data, datasets, cost, config.run.seed)
    loader = Loader(spec, datasets, data, 0, 1, start_step=0)
    try:
        (pack,) = next(iter(loader)).packs
    finally:
        loader.close()
    return [sample.video for sample in pack if sample.video is not None]


def cost_model(config: RunConfig, codec: VideoCodec, text: TextEncoder) -> CostModel:
    """Tokens of a sample at most: what the plan balances and budgets."""
    tokenizer = f"{text.fingerprint} {codec.fingerprint}"
    return cost_of_latents(config, codec.latent_shape, codec.stride, text.max_tokens, tokenizer)


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

    def tokens(num_frames: int, height: int, width: int) -> int | None:
        try:
            t, h, w = latent_shape(num_frames, height, width)
        except EncoderError:
            return None
        return growth * t * h * w // (pt * ph * pw)

    latent_shape(data.num_frames, data.height, data.width)  # the recipe's own size must fit
    tile = stride[1] * ph, stride[2] * pw

    def layers(num_frames: int) -> int | None:
        try:
            t = latent_shape(num_frames, *tile)[0]
        except EncoderError:
            return None
        return None if t % pt else growth * t // pt

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
    """Length of a sample at which joint attention takes as many FLOPs as all else for its clip."""
    none = dict.fromkeys(model.streams, 0)
    many = 1 << 20
    at_rest = forward_flops(model, none, 0, 1, 1)
    rest = forward_flops(model, {**none, VIDEO: many}, 0, 1, 1) - at_rest
    attention = forward_flops(model, none, many, 1, 1) - at_rest
    return max(1, round(rest / attention))
