"""Reading and decoding, beside webdataset, energon and the decoder alone, in CPU seconds.

24 clips of 256 x 256 pixels (72 frames at 24 a second, H.264), noise and gradients that move, in
shards that all contenders read in turn, interleaved, on one core; the best of the rounds counts,
since neighbours on the machine only ever add time. Every contender gives batches of 8 clips as
uint8 tensors.

    end_to_end_vs_webdataset  clips a CPU second: ours (16 frames at 8 a second, read by index,
                              checksum, exact window, one scaler; RGB) over webdataset's, with what
                              its users write: every frame by `to_ndarray(format="rgb24")`, then
                              the same 16 frames are taken
    end_to_end_vs_energon     the same over energon with the same function (a cooker)
    decode_rgb, decode_yuv    frames a CPU second of our decoder, all frames of a clip, over PyAV
                              that only decodes: no pixel is touched
    overhead_ms               milliseconds a clip of everything that is no decoding: plan, read,
                              checksum, parse; of 240 clips, in steps of 64

energon is in the extra `bench`; without it, its row is left out, and that is said. Beside the first
row: the same where every frame is wanted, and no decoder can spare any.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import torch
from goals import Goal, Row, goal_of

from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig
from kinodit.data.decode import DecodedMedia, View, decode
from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardReader
from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from kinodit.data.writer import DatasetWriter

NUM_CLIPS, NUM_FRAMES, SIDE, BATCH, ROUNDS = 24, 72, 256, 8, 5
WANTED = DecodeConfig(height=SIDE, width=SIDE, num_frames=16, fps=8.0, window="first")
EVERY = replace(WANTED, num_frames=NUM_FRAMES, fps=24.0)
TAKEN = [3 * index for index in range(16)]

GOALS = (
    Goal("end_to_end_vs_webdataset", 2.5, at_least=True),
    Goal("end_to_end_vs_energon", 1.0, at_least=True),
    Goal("decode_rgb", 0.65, at_least=True),
    Goal("decode_yuv", 0.8, at_least=True),
    Goal("overhead_ms", 0.05),
)


def clip_bytes(number: int) -> bytes:
    """A gradient that moves over coarse noise, with grain: 80 kB, as web videos have."""
    source = np.random.default_rng(number)
    coarse = source.integers(0, 256, (SIDE // 16 + NUM_FRAMES // 8 + 1, SIDE // 16, 3))
    still = coarse.repeat(16, 0).repeat(16, 1).astype(np.float32)
    ramp = np.linspace(0, 120, SIDE)[None, :, None]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "threads": "1", "preset": "medium"}
        for index in range(NUM_FRAMES):
            grain = source.normal(0, 2.2, (SIDE, SIDE, 1))
            frame = 0.5 * still[2 * index : 2 * index + SIDE] + ramp + grain
            pixels = np.clip(frame, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_clips(folder: Path) -> Dataset:
    with DatasetWriter(folder, shard_bytes=2 << 20) as writer:
        for number in range(NUM_CLIPS):
            meta = RecordMeta(
                id=f"c{number}", modality="video", width=SIDE, height=SIDE, fps=24.0,
                num_frames=NUM_FRAMES, duration_s=NUM_FRAMES / 24,
                captions=(Caption(f"clip number {number}"),),
            )  # fmt: skip
            writer.write(Record(f"c{number:03d}", meta, {"mp4": clip_bytes(number)}))
    return Dataset(folder)


def usual(data: bytes, wanted: list[int] | None) -> torch.Tensor:
    """What users of streaming loaders write."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = frames if wanted is None else [frames[index] for index in wanted]
    return torch.from_numpy(np.stack(chosen))


def batches(clips: Iterator[torch.Tensor]) -> int:
    """Collates batches; the number of clips."""
    held: list[torch.Tensor] = []
    count = 0
    for clip in clips:
        held.append(clip)
        count += 1
        if len(held) == BATCH:
            torch.stack(held)
            held.clear()
    return count


def by_webdataset(folder: Path, wanted: list[int] | None) -> int:
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(16)
    return batches(usual(sample["mp4"], wanted) for sample in pipeline)


def by_energon(folder: Path) -> tuple[int, float]:
    """Clips, and the CPU seconds of going through them: building the loader does not count."""
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.task_encoder import DefaultTaskEncoder
    from megatron.energon.task_encoder.cooking import Cooker, basic_sample_keys

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**basic_sample_keys(sample), "video": usual(sample["mp4"], TAKEN)}

    class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
        decoder = None
        cookers = [Cooker(cook)]  # noqa: RUF012

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            return torch.stack([sample["video"] for sample in samples])

        @stateless
        def encode_batch(self, batch: Any) -> Any:
            return batch

    dataset = get_train_dataset(
        folder, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=BATCH, shuffle_buffer_size=16, max_samples_per_sequence=16,
        task_encoder=Encoder(), repeat=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        # It pins memory whether there is a device or not.
        warnings.simplefilter("ignore")
        loader = get_loader(dataset)
    start = time.process_time()
    return sum(len(batch) for batch in loader), time.process_time() - start


def by_kinodit(dataset: Dataset, config: DecodeConfig) -> int:
    data = DataConfig(
        **{**vars(config), "datasets": {"clips": DatasetConfig(str(dataset.directory))}},
        samples_per_step=BATCH, num_threads=1, workers="threads",
    )  # fmt: skip
    spec = plan_spec(data, {"clips": dataset}, CostModel(64, None), seed=0)
    count = 0
    with Loader(spec, {"clips": dataset}, data, end_step=NUM_CLIPS // BATCH) as loader:
        for step in loader:
            videos = [sample.video for pack in step.packs for sample in pack]
            count += len(torch.stack([video for video in videos if video is not None]))
    return count


def decoding_only(records: list[Record]) -> int:
    """Frames; nothing is done with them."""
    count = 0
    for record in records:
        with av.open(io.BytesIO(record.members["mp4"]), format="mov") as container:
            container.streams.video[0].thread_type = "NONE"
            count += sum(1 for _ in container.decode(video=0))
    return count


def decoded(records: list[Record], config: DecodeConfig) -> int:
    return sum(NUM_FRAMES for record in records if decode(record, config).num_bytes)


def write_more(folder: Path, records: list[Record]) -> Dataset:
    """Ten times the clips, under keys of their own: steps of an epoch, as long runs have them."""
    with DatasetWriter(folder, shard_bytes=2 << 20) as writer:
        for turn in range(10):
            for record in records:
                key = f"{record.key}-{turn}"
                writer.write(Record(key, replace(record.meta, id=key), record.members))
    return Dataset(folder)


def overhead(dataset: Dataset) -> int:
    """Everything but decoding."""
    pixel = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    media = DecodedMedia(pixel, None, 8.0, 0.0, View(0, (0, 0)))
    steps = 40
    data = DataConfig(
        **{**vars(WANTED), "datasets": {"clips": DatasetConfig(str(dataset.directory))}},
        samples_per_step=64, num_threads=1, workers="threads",
    )  # fmt: skip
    spec = plan_spec(data, {"clips": dataset}, CostModel(64, None), seed=0)
    with (
        patch("kinodit.data.decoders.decode", lambda *_: media),
        Loader(spec, {"clips": dataset}, data, end_step=steps) as loader,
    ):
        return sum(len(pack) for step in loader for pack in step.packs)


def measured(contenders: dict[str, Callable[[], int | tuple[int, float]]]) -> dict[str, float]:
    """Things a CPU second of each contender, the best of rounds in which all take turns."""
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.process_time()
            found = run()
            if isinstance(found, int):
                found = found, time.process_time() - start
            best[name] = max(best.get(name, 0.0), found[0] / found[1])
    return best


def prepare_for_energon(folder: Path) -> Path | None:
    """A copy of the shards with energon's own index; None where energon is not installed."""
    if importlib.util.find_spec("megatron.energon") is None:
        print("no row of energon: pip install 'kinodit[bench]'", file=sys.stderr)
        return None
    copy = folder.with_name("energon")
    shutil.copytree(folder, copy)
    for path in copy.glob("*.idx"):
        path.unlink()
    command = str(Path(sys.executable).with_name("energon"))
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([command, "prepare", *options, str(copy)], check=True, capture_output=True)
    return copy


def rows() -> Iterator[Row]:
    """The rows of this family."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        dataset = write_clips(Path(root) / "clips")
        folder = dataset.directory
        energon = prepare_for_energon(folder)
        reader = ShardReader(dataset)
        records = [reader.read(index) for index in range(NUM_CLIPS)]
        more = write_more(Path(root) / "more", records)
        yuv = replace(EVERY, pixels="yuv420")
        rival = {} if energon is None else {"energon": lambda: by_energon(energon)}
        best = measured(
            {
                "kinodit": lambda: by_kinodit(dataset, WANTED),
                "webdataset": lambda: by_webdataset(folder, TAKEN),
                **rival,
                "kinodit, every frame": lambda: by_kinodit(dataset, EVERY),
                "webdataset, every frame": lambda: by_webdataset(folder, None),
                "PyAV alone": lambda: decoding_only(records),
                "rgb": lambda: decoded(records, EVERY),
                "yuv": lambda: decoded(records, yuv),
                "overhead": lambda: overhead(more),
            }
        )
        reader.close()
    every = best["kinodit, every frame"] / best["webdataset, every frame"]
    ours, frames = best["kinodit"], best["PyAV alone"]
    for name, value, beside in (
        (
            "end_to_end_vs_webdataset",
            ours / best["webdataset"],
            f"{ours:.1f} and {best['webdataset']:.1f} clips a CPU second; every frame: {every:.2f}",
        ),
        (
            "end_to_end_vs_energon",
            ours / best.get("energon", math.nan),
            f"energon {best.get('energon', math.nan):.1f} clips a CPU second",
        ),
        ("decode_rgb", best["rgb"] / frames, f"{best['rgb']:.0f} of {frames:.0f} frames"),
        ("decode_yuv", best["yuv"] / frames, f"{best['yuv']:.0f} of {frames:.0f} frames"),
        ("overhead_ms", 1000 / best["overhead"], f"{best['overhead']:.0f} clips a CPU second"),
    ):
        if not math.isnan(value):
            yield replace(goal_of(name, GOALS).row(name, value), size=beside)


assert Fraction(24) == 3 * Fraction(str(WANTED.fps)), "TAKEN are the frames of that rate"
