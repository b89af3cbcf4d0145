"""The video codec of a run with its statistics, and what its data plan has to know of encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from kinodit.models.encoders.base import EncoderError, TextEncoder, VideoCodec
from kinodit.models.encoders.wavelet import WaveletCodec, fit_standardisation
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
    patch = config.modalities.video.patch
    per_patch = patch[0] * patch[1] * patch[2]

    growth = max((task.most_tokens for task in config.tasks.values()), default=1)

    def tokens(num_frames: int) -> int:
        t, h, w = codec.latent_shape(num_frames, config.data.height, config.data.width)
        return growth * t * h * w // per_patch

    video_tokens = tokens(config.data.num_frames)
    image_tokens: int | None
    try:
        image_tokens = tokens(1)
    except EncoderError:
        image_tokens = None  # the plan refuses still images then
    return CostModel(
        video_tokens=video_tokens,
        image_tokens=image_tokens,
        text_tokens=text.max_tokens,
        tokenizer=f"{text.fingerprint} {codec.fingerprint}",
    )
