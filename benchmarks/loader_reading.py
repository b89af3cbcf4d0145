"""Reading and decoding, beside webdataset, energon and the decoder alone, in CPU seconds.

24 clips of 256 x 256 pixels (72 frames at 24 a second, H.264), noise and gradients that move, in
shards that all contenders read in turn, interleaved, on one core; decoders take turns at each clip.
Ratios are the median of those of each turn: a neighbour on the machine slows both sides of it.
Other figures are the best, since neighbours only ever add time. Every contender gives batches of 8
clips as uint8 tensors. Rows of ours decode in threads, but for those that say processes.

    end_to_end_vs_webdataset  clips a CPU second: ours (16 frames at 8 a second, read by index,
                              checksum, exact window, one scaler; RGB) over webdataset's, with what
                              its users write: every frame by `to_ndarray(format="rgb24")`, then
                              the same 16 frames are taken
    end_to_end_vs_energon     the same over energon with the same function (a cooker)
    decode_rgb, decode_yuv    frames a CPU second of our decoder, all frames of a clip, over PyAV
                              that only decodes: no pixel is touched
    overhead_ms               milliseconds a clip of everything that is no decoding: plan, read,
                              checksum, parse; of 240 clips, in steps of 64
    decode_processes_*        the same decoded in a process of its own, which is the default: with
                              the CPU seconds of that process
    end_to_end_processes_*    the same, with those of its server and of starting both, too

energon is in the extra `bench`; without it, its row is left out, and that is said. Beside the first
row: the same where every frame is wanted, and no decoder can spare any.
"""

from __future__ import annotations

import io
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import torch
from goals import Goal, Row, goal_of
from loader_rivals import BATCH, TAKEN, by_energon, by_webdataset, prepare_for_energon
from msgspec import structs

from kinodit.data import fork_server
from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig
from kinodit.data.decode import DecodedMedia, View, decode
from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.picture import CENTRE
from kinodit.data.reader import ShardReader
from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from kinodit.data.worker import DecodeWorker
from kinodit.data.writer import DatasetWriter

NUM_CLIPS, NUM_FRAMES, SIDE, ROUNDS = 24, 72, 256, 8
SHORT_ROUNDS = 30
"""Of what takes a tenth of a second: in more of them, one that nobody disturbs."""
WANTED = DecodeConfig(height=SIDE, width=SIDE, num_frames=16, fps=8.0, window="first")
EVERY = replace(WANTED, num_frames=NUM_FRAMES, fps=24.0)

GOALS = (
    Goal("end_to_end_vs_webdataset", 2.5, at_least=True),
    Goal("end_to_end_vs_energon", 1.0, at_least=True),
    Goal("decode_rgb", 0.65, at_least=True),
    Goal("decode_yuv", 0.8, at_least=True),
    Goal("overhead_ms", 0.05),
    Goal("end_to_end_processes_vs_webdataset", 2.5, at_least=True),
    Goal("end_to_end_processes_vs_energon", 1.0, at_least=True),
    Goal("decode_processes_rgb", 0.65, at_least=True),
    Goal("decode_processes_yuv", 0.8, at_least=True),
)

Workers = Literal["threads", "processes"]
Speeds = dict[str, list[float]]
"""Contender -> what it did in a CPU second, in each of its turns."""


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


def by_kinodit(
    dataset: Dataset, config: DecodeConfig, workers: Workers = "threads", turns: int = 1
) -> int:
    data = DataConfig(
        **{**vars(config), "datasets": {"clips": DatasetConfig(str(dataset.directory))}},
        samples_per_step=BATCH, num_threads=1, workers=workers,
    )  # fmt: skip
    spec = plan_spec(data, {"clips": dataset}, CostModel(64, None), seed=0)
    count = 0
    with Loader(spec, {"clips": dataset}, data, end_step=turns * NUM_CLIPS // BATCH) as loader:
        for step in loader:
            videos = [sample.video for pack in step.packs for sample in pack]
            count += len(torch.stack([video for video in videos if video is not None]))
    return count


def decoding_only(record: Record) -> None:
    """Nothing is done with the frames."""
    with av.open(io.BytesIO(record.members["mp4"]), format="mov") as container:
        container.streams.video[0].thread_type = "NONE"
        assert sum(1 for _ in container.decode(video=0)) == NUM_FRAMES


def cpu_s() -> float:
    """Of this process, and of those that it, or a child that it has waited for, has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def with_processes(run: Callable[[], int]) -> tuple[int, float]:
    """What `run` returns, and the CPU seconds of it with all processes that it makes."""
    fork_server.stop()
    start_s = cpu_s()
    fork_server.fork_early()
    found = run()
    # The server waits for the processes that decode as they are closed, and this one for it.
    fork_server.stop()
    return found, cpu_s() - start_s


def write_more(folder: Path, records: list[Record]) -> Dataset:
    """Ten times the clips, under keys of their own: steps of an epoch, as long runs have them."""
    with DatasetWriter(folder, shard_bytes=2 << 20) as writer:
        for turn in range(10):
            for record in records:
                key = f"{record.key}-{turn}"
                writer.write(Record(key, structs.replace(record.meta, id=key), record.members))
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


def decoders(
    records: list[Record], contenders: dict[str, Callable[[Record], object]], worker: DecodeWorker
) -> Speeds:
    """Frames a CPU second of each contender, all frames of a clip, with those of `worker`."""
    found: Speeds = {name: [] for name in contenders}

    def spent_s() -> float:
        running_ns = Path(f"/proc/{worker.pid}/schedstat").read_text().split()[0]
        return time.process_time() + int(running_ns) / 1e9

    for run in contenders.values():
        # Processes are started, and memory is there.
        run(records[0])
    for _ in range(ROUNDS):
        for record in records:
            for name, run in contenders.items():
                start_s = spent_s()
                run(record)
                found[name].append(NUM_FRAMES / (spent_s() - start_s))
    return found


def measured(
    contenders: dict[str, Callable[[], int | tuple[int, float]]], rounds: int = ROUNDS
) -> Speeds:
    """Things a CPU second of each contender, in rounds in which all take turns."""
    speeds: Speeds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            found = run()
            if isinstance(found, int):
                found = found, time.process_time() - start
            speeds[name].append(found[0] / found[1])
    return speeds


def ratio(speeds: Speeds, ours: str, theirs: str) -> float:
    """How much faster, by the median of the turns; not a number without the other."""
    if theirs not in speeds:
        return math.nan
    pairs = zip(speeds[ours], speeds[theirs], strict=True)
    return statistics.median(one / other for one, other in pairs)


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
        rivals = {} if energon is None else {"energon": lambda: by_energon(energon)}
        speeds = measured(
            {
                "kinodit": lambda: by_kinodit(dataset, WANTED),
                "webdataset": lambda: by_webdataset(folder, TAKEN),
                **rivals,
                "kinodit, every frame": lambda: by_kinodit(dataset, EVERY),
                "webdataset, every frame": lambda: by_webdataset(folder, None),
                "processes": lambda: with_processes(
                    lambda: by_kinodit(dataset, WANTED, "processes", turns=16)
                ),
            }
        )
        speeds |= measured({"overhead": lambda: overhead(more)}, SHORT_ROUNDS)
        with closing(DecodeWorker()) as worker:
            contenders: dict[str, Callable[[Record], object]] = {
                "PyAV alone": decoding_only,
                "rgb": lambda record: decode(record, EVERY),
                "yuv": lambda record: decode(record, yuv),
                "rgb, processes": lambda record: worker.decode(record, EVERY, 0.0, CENTRE),
                "yuv, processes": lambda record: worker.decode(record, yuv, 0.0, CENTRE),
            }
            speeds |= decoders(records, contenders, worker)
        reader.close()
    best = {name: max(found) for name, found in speeds.items()}
    every = ratio(speeds, "kinodit, every frame", "webdataset, every frame")
    clips = f"{best['kinodit']:.1f} and {best['webdataset']:.1f} clips a CPU second"
    rivals_best = best.get("energon", math.nan)
    for name, value, beside in (
        (
            "end_to_end_vs_webdataset",
            ratio(speeds, "kinodit", "webdataset"),
            f"{clips}; every frame: {every:.2f}",
        ),
        (
            "end_to_end_vs_energon",
            ratio(speeds, "kinodit", "energon"),
            f"energon {rivals_best:.1f} clips a CPU second",
        ),
        *(
            (f"decode_{kind}", ratio(speeds, kind, "PyAV alone"), f"{best[kind]:.0f} frames")
            for kind in ("rgb", "yuv")
        ),
        ("overhead_ms", 1000 / best["overhead"], f"{best['overhead']:.0f} clips a CPU second"),
        (
            "end_to_end_processes_vs_webdataset",
            ratio(speeds, "processes", "webdataset"),
            f"{ratio(speeds, 'processes', 'kinodit'):.2f} of those in threads",
        ),
        ("end_to_end_processes_vs_energon", ratio(speeds, "processes", "energon"), ""),
        *(
            (
                f"decode_processes_{kind}",
                ratio(speeds, f"{kind}, processes", "PyAV alone"),
                f"{ratio(speeds, f'{kind}, processes', kind):.2f} of decoding in threads",
            )
            for kind in ("rgb", "yuv")
        ),
    ):
        if not math.isnan(value):
            yield replace(goal_of(name, GOALS).row(name, value), size=beside)


assert Fraction(24) == 3 * Fraction(str(WANTED.fps)), "TAKEN are the frames of that rate"
