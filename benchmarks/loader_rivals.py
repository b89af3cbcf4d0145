"""What webdataset and energon make of the clips that `loader_reading.py` times ours with."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

BATCH = 8
TAKEN = [3 * index for index in range(16)]
"""Frames of a clip of 24 a second that a recipe of 8 a second takes."""


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
