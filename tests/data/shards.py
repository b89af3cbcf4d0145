"""Small datasets and hand-made tar archives."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kinodit.data.expression import parse
from kinodit.data.filtering import by_expression
from kinodit.data.manifest import Dataset
from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.writer import DatasetWriter


def picture(number: int = 0, side: int = 16) -> bytes:
    """A PNG of one colour."""
    target = io.BytesIO()
    Image.new("RGB", (side, side), (number * 37 % 256, 90, 200)).save(target, "PNG")
    return target.getvalue()


def image_record(number: int, **changes: object) -> Record:
    """A valid image record; `changes` replace fields of its metadata."""
    fields: dict[str, object] = {
        "id": f"picture {number}",
        "modality": "image",
        "width": 16,
        "height": 16,
        "num_frames": 1,
        "captions": (Caption(f"colour number {number}"),),
        "scores": {"number": float(number)},
        **changes,
    }
    return Record(f"image-{number:03d}", RecordMeta(**fields), {"png": picture(number)})  # type: ignore[arg-type]


def write_images(directory: Path, count: int = 12, shard_bytes: int = 12_000) -> Dataset:
    """A dataset of images in several shards."""
    with DatasetWriter(directory, shard_bytes=shard_bytes) as writer:
        for number in range(count):
            writer.write(image_record(number))
    return Dataset(directory)


def passing(dataset: Dataset, text: str) -> list[int]:
    """The samples that a filter lets pass."""
    masks = [
        by_expression(dataset, piece, parse(text), np.arange(len(piece)))
        for piece in dataset.pieces()
    ]
    found: list[int] = np.flatnonzero(np.concatenate(masks)).tolist()
    return found


def tar_bytes(members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], **kinds: bytes) -> bytes:
    """A tar archive by Python's tarfile; `kinds` maps a member's name to its tar type."""
    target = io.BytesIO()
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in pairs:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            header.type = kinds.get(name, tarfile.REGTYPE)
            archive.addfile(header, io.BytesIO(data))
    return target.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes]) -> Path:
    """Writes `tar_bytes` to `path`."""
    path.write_bytes(tar_bytes(members))
    return path
