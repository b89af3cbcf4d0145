"""How fast shards are indexed, beside reading them from the page cache.

Own shards and folders of img2dataset, in bytes per CPU-second of one process: indexing parses every
header and record, and takes CRC-32 of each sample and the BLAKE3 of each shard. Rows `_of_sums` are
beside these two sums alone, of the same bytes in the same run.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset
from goals import Row

from kinodit.data.checksums import PIECE_BYTES, Digest, crc32
from kinodit.data.indexing import IndexOptions, index_shards
from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.writer import DatasetWriter

CLIP_BYTES, PICTURE_BYTES = 1 << 20, 40_000
TOTAL_BYTES = 256 << 20
REPEATS = 3
GOAL = 0.5


def rows() -> Iterator[Row]:
    """Shares of the page cache's speed, own shards first."""
    with tempfile.TemporaryDirectory() as name:
        for kind, write in (("clips", _own), ("img2dataset", _img2dataset)):
            folder = Path(name) / kind
            write(folder)
            read, sums, index = (_rate(folder, work) for work in (_read, _sums, _index))
            note = f"{index:,.0f} MB/CPU-s; read {read:,.0f}, sums alone {sums:,.0f}"
            yield Row.at_least(f"indexing/{kind}", index / read, GOAL, note)
            yield Row.at_least(f"indexing/{kind}_of_sums", index / sums, GOAL, note)


def _rate(folder: Path, work: Callable[[Path], object]) -> float:
    """MB per CPU-second, the best of `REPEATS`; threads count."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    best_s = float("inf")
    for _ in range(REPEATS):
        start_s = time.process_time()
        work(folder)
        best_s = min(best_s, time.process_time() - start_s)
    return num_bytes / best_s / 1e6


def _read(folder: Path) -> None:
    block = bytearray(1 << 20)
    for path in folder.glob("*.tar"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _index(folder: Path) -> None:
    index_shards(folder, "d", IndexOptions(algorithm="blake3"))


def _sums(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        digest, view = Digest("blake3"), np.memmap(path, np.uint8, "r").data
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            digest.update(piece)
            crc32(piece)


def _own(folder: Path) -> None:
    payload = np.random.default_rng(0).bytes(CLIP_BYTES)
    with DatasetWriter(folder, shard_bytes=64 << 20) as writer:
        for number in range(TOTAL_BYTES // CLIP_BYTES):
            meta = RecordMeta(
                id=str(number), modality="video", width=640, height=360, fps=24.0, num_frames=120,
                duration_s=5.0, captions=(Caption("a fox moves left over a beach"),),
            )  # fmt: skip
            writer.write(Record(f"clip-{number:06d}", meta, {"mp4": payload}))


def _img2dataset(folder: Path) -> None:
    folder.mkdir()
    payload = np.random.default_rng(0).bytes(PICTURE_BYTES)
    said = {
        "caption": "a fox on a beach", "url": "https://example.org/fox.jpg", "status": "success",
        "width": 256, "height": 256, "original_width": 1024, "original_height": 1024,
        "sha256": "0" * 64, "exif": "{}", "similarity": 0.3,
    }  # fmt: skip
    per_shard = 1000
    for shard in range(max(1, TOTAL_BYTES // 4 // PICTURE_BYTES // per_shard)):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as sink:
            for number in range(per_shard):
                key = f"{shard:05d}{number:04d}"
                text = json.dumps(said | {"key": key}).encode()
                sink.write({"__key__": key, "jpg": payload, "json": text, "txt": "a fox"})
