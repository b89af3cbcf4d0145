"""torchcodec as a stage behind the plan's order, where it loads (extra `torchcodec`)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.pipeline import OrderedSource
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from tests.data.clips import small_records, write_dataset

WANTED = [1, 4, 7]


def why_not() -> str:
    """Why torchcodec cannot be used here; "" if it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if "cannot open" in line]
        return f"torchcodec does not load: {(lines or [str(error)])[0][:160]}"
    return ""


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_torchcodec_decodes_behind_the_plans_order(tmp_path: Path) -> None:
    import av
    from torchcodec.decoders import VideoDecoder

    made = write_dataset(tmp_path / "clips", small_records(10))
    config = DataConfig(
        datasets={"clips": DatasetConfig(str(made.directory))},
        num_frames=4, fps=6.0, samples_per_step=5, packs_per_step=2,
    )  # fmt: skip
    spec = plan_spec(config, {"clips": made}, CostModel(20, 5, 0, 3), seed=1)

    def decoded(sample: dict[str, bytes]) -> tuple[bytes, torch.Tensor]:
        decoder = VideoDecoder(sample["mp4"], dimension_order="NHWC", num_ffmpeg_threads=1)
        return sample["mp4"], decoder.get_frames_at(WANTED).data

    found = list(
        webdataset.DataPipeline(
            OrderedSource(spec, {"clips": made}, end_step=2),
            webdataset.select(lambda sample: "mp4" in sample),
            webdataset.map(decoded),
        )
    )
    assert found
    for data, frames in found:
        with av.open(io.BytesIO(data)) as container:
            theirs = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        expected = np.stack([theirs[number] for number in WANTED]).astype(np.int16)
        # Two releases of FFmpeg convert colours.
        assert np.abs(frames.numpy().astype(np.int16) - expected).max() <= 3
