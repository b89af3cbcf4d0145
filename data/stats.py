"""What is in a dataset, from its index alone: no shard is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.data.manifest import Dataset
from kinodit.data.record import MODALITIES
from kinodit.data.row_facts import FLAG_AUDIO

_DURATION_EDGES_S = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 60)
_CAPTION_EDGES = (0, 1, 20, 40, 80, 160, 320, 640, 1280)
_MAX_ROWS = 12
_BAR_CHARS = 30

Histogram = list[tuple[str, int]]
"""(label, count), in an order that makes sense."""


@dataclass(frozen=True)
class ModalityStats:
    """One modality: its samples, their hours and frames, and how many have sound."""

    modality: str
    num_samples: int
    hours: float
    num_frames: int
    num_with_audio: int
    num_bytes: int


@dataclass(frozen=True)
class DatasetStats:
    """Everything `kinodit data stats` shows. `num_uncaptioned` counts captions of no characters."""

    name: str
    content_hash: str
    num_samples: int
    num_shards: int
    num_bytes: int
    num_uncaptioned: int
    modalities: list[ModalityStats]
    resolutions: Histogram
    rates: Histogram
    durations: Histogram
    caption_chars: Histogram


def collect(dataset: Dataset) -> DatasetStats:
    """Statistics of all samples of a dataset."""
    column = {
        name: dataset.column(name)
        for name in (
            "size", "num_frames", "height", "width", "fps_milli", "duration_ms", "caption_chars",
            "modality", "flags",
        )
    }  # fmt: skip
    seen = column["modality"] != MODALITIES.index("audio")
    moving = column["modality"] == MODALITIES.index("video")
    lasting = column["duration_ms"] > 0
    sides = zip(column["width"][seen].tolist(), column["height"][seen].tolist(), strict=True)
    return DatasetStats(
        name=dataset.name,
        content_hash=dataset.content_hash,
        num_samples=len(dataset),
        num_shards=len(dataset.manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in dataset.manifest.shards),
        num_uncaptioned=int((column["caption_chars"] == 0).sum()),
        modalities=_modalities(column),
        resolutions=_frequent([f"{width}x{height}" for width, height in sides]),
        rates=_frequent([f"{milli / 1000:g}" for milli in column["fps_milli"][moving].tolist()]),
        durations=_binned(column["duration_ms"][lasting] / 1000, _DURATION_EDGES_S),
        caption_chars=_binned(column["caption_chars"], _CAPTION_EDGES),
    )


def _modalities(column: dict[str, NDArray[Any]]) -> list[ModalityStats]:
    found = []
    for code, modality in enumerate(MODALITIES):
        mine = column["modality"] == code
        if mine.any():
            found.append(
                ModalityStats(
                    modality=modality,
                    num_samples=int(mine.sum()),
                    hours=float(column["duration_ms"][mine].sum(dtype=np.float64)) / 3.6e6,
                    num_frames=int(column["num_frames"][mine].sum(dtype=np.int64)),
                    num_with_audio=int((column["flags"][mine] & FLAG_AUDIO != 0).sum()),
                    num_bytes=int(column["size"][mine].sum(dtype=np.int64)),
                )
            )
    return found


def _frequent(labels: list[str]) -> Histogram:
    names, counts = np.unique(np.array(labels, dtype=np.str_), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs = [(str(names[i]), int(counts[i])) for i in order]
    if len(pairs) <= _MAX_ROWS:
        return pairs
    rest = sum(count for _, count in pairs[_MAX_ROWS - 1 :])
    return [*pairs[: _MAX_ROWS - 1], (f"{len(pairs) - _MAX_ROWS + 1} others", rest)]


def _binned(values: NDArray[Any], edges: Sequence[int]) -> Histogram:
    counts, _ = np.histogram(values, [*edges, np.inf])
    labels = [
        f"{low}" if high == low + 1 and values.dtype.kind != "f" else f"{low} to {high}"
        for low, high in pairwise(edges)
    ]
    labels.append(f"{edges[-1]} and more")
    pairs = list(zip(labels, counts.tolist(), strict=True))
    used = [index for index, (_, count) in enumerate(pairs) if count]
    return pairs[used[0] : used[-1] + 1] if used else []


def table(stats: DatasetStats) -> str:
    """The statistics as text for a terminal."""
    lines = [
        f"{stats.name}: {stats.num_samples} samples in {stats.num_shards} shard(s), "
        f"{stats.num_bytes / 2**20:.1f} MiB, content {stats.content_hash[:12]}",
        "",
        f"{'modality':<10}{'samples':>10}{'hours':>10}{'frames':>12}{'with sound':>12}{'MiB':>10}",
    ]
    lines += [
        f"{part.modality:<10}{part.num_samples:>10}{part.hours:>10.3f}{part.num_frames:>12}"
        f"{part.num_with_audio:>12}{part.num_bytes / 2**20:>10.1f}"
        for part in stats.modalities
    ]
    if stats.num_uncaptioned:
        lines += ["", f"{stats.num_uncaptioned} samples have no caption"]
    for title, histogram in (
        ("resolution (pixels)", stats.resolutions),
        ("frame rate (per second)", stats.rates),
        ("duration (seconds)", stats.durations),
        ("first caption (characters)", stats.caption_chars),
    ):
        if histogram:
            lines += ["", title, *_bars(histogram)]
    return "\n".join(lines)


def _bars(histogram: Histogram) -> list[str]:
    width = max(len(label) for label, _ in histogram)
    most = max(count for _, count in histogram)
    return [
        f"  {label:<{width}} {count:>9}  {'█' * round(_BAR_CHARS * count / most)}".rstrip()
        for label, count in histogram
    ]
