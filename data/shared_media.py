"""Decoded samples that several ranks of a node need: decoded by one of them, mapped by all.

Ranks of tensor and context parallelism train on the same packs. What one of them has decoded lies
in memory that the others map, so that a node holds and decodes a sample once, however many of its
ranks share it. Where that fails (no room, another user's folder) a rank decodes for itself: it
costs memory and time, and changes nothing, since the same arguments decode to the same bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

from kinodit.data.colour import Planes
from kinodit.data.decode import DecodedMedia, View
from kinodit.data.meta import RecordMeta, document_of, parse_meta

NUM_LOCKS = 64
STALE_S = 86_400.0
ALIGNMENT = 64
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}


class DecodedRecord(Struct, frozen=True, gc=False):
    """A record's metadata and what its medium was decoded to."""

    meta: RecordMeta
    media: DecodedMedia


def shared_folder(*key: object) -> Path:
    """Where ranks of this node find what they share: in memory, where the system has such a place.

    `key` is what the ranks have in common, and no others.
    """
    root = Path("/dev/shm")
    if not os.access(root, os.W_OK):
        root = Path(tempfile.gettempdir())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    return root / f"kinodit-{os.getuid()}-{name}"


class SharedMedia:
    """Decoded samples of the steps that are being loaded, in `folder`. Threads share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_usable = False
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            self._is_usable = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        _sweep(folder.parent)

    def sample(self, step: int, key: object, make: Callable[[], DecodedRecord]) -> DecodedRecord:
        """What `make` returns here, or returned in another rank.

        Args:
            step: that needs it; `forget` lets go of earlier ones.
            key: everything that `make` depends on, with a `repr` that says it all.
            make: decodes; what it raises is raised in every rank that asks.
        """
        if not self._is_usable:
            return make()
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        path = self._folder / f"{step:012d}-{digest}"
        found = _read(path)
        if found is not None:
            return found
        with self._lock(int(digest, 16) % NUM_LOCKS):
            found = _read(path)
            if found is not None:
                return found
            made = make()
            try:
                _write(path, made)
            except OSError:
                # No room for it: this rank keeps what it has, others make their own.
                return made
        return _read(path) or made

    def clear(self) -> None:
        """Removes what an earlier start has left; before any rank loads."""
        self.forget(1 << 62)

    def forget(self, before_step: int) -> None:
        """Lets go of samples of earlier steps; who has mapped them keeps them."""
        if not self._is_usable:
            return
        with suppress(OSError):
            for path in list(self._folder.iterdir()):
                first, _, rest = path.name.partition("-")
                if rest and first.isdigit() and int(first) < before_step:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder; ranks that still load decode for themselves."""
        if self._is_usable:
            self._is_usable = False
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _lock(self, number: int) -> Iterator[None]:
        """One process or thread at a time; the kernel frees it when its holder ends."""
        try:
            descriptor = os.open(
                self._folder / f"lock{number}",
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
        except OSError:
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _sweep(root: Path) -> None:
    """Removes folders of this user that nobody has used for a day: of runs that were killed."""
    for folder in root.glob(f"kinodit-{os.getuid()}-*"):
        with suppress(OSError):
            if time.time() - folder.lstat().st_mtime > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, made: DecodedRecord) -> None:
    """A line of JSON that says what follows, then the arrays, each at a multiple of 64 bytes."""
    media, planes = made.media, made.media.planes
    arrays = {"video": media.video, "audio": media.audio, "references": media.references}
    if planes is not None:
        arrays |= {"y": planes.y, "uv": planes.uv}
    there = {name: array for name, array in arrays.items() if array is not None}
    said: dict[str, Any] = {
        "meta": document_of(made.meta),
        "fps": media.fps,
        "start_s": media.start_s,
        "view": [media.view.first, *media.view.crop],
        "planes": [planes.matrix, planes.is_full] if planes is not None else None,
        "arrays": {
            name: [str(array.dtype).removeprefix("torch."), list(array.shape)]
            for name, array in there.items()
        },
    }
    head = json.dumps(said).encode() + b"\n"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="part", delete=False) as file:
        try:
            file.write(head)
            for array in there.values():
                file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(array.contiguous().numpy().data.cast("B"))
            file.flush()
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def _read(path: Path) -> DecodedRecord | None:
    """What lies there, mapped; None if nothing does."""
    try:
        with path.open("rb") as file:
            # Private: whoever writes to a tensor writes to a copy of its own.
            held = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    except (OSError, ValueError):
        return None
    end = held.find(b"\n") + 1
    said = json.loads(held[:end])
    arrays: dict[str, Tensor] = {}
    for name, (dtype, shape) in said["arrays"].items():
        end += -end % ALIGNMENT
        count = math.prod(shape)
        array = torch.empty(0, dtype=DTYPES[dtype])
        if count:
            array = torch.frombuffer(held, dtype=DTYPES[dtype], count=count, offset=end)
        arrays[name] = array.reshape(shape)
        end += count * array.element_size()
    planes = None
    if said["planes"] is not None:
        planes = Planes(arrays["y"], arrays["uv"], *said["planes"])
    first, row, column = said["view"]
    return DecodedRecord(
        parse_meta(said["meta"]["id"], said["meta"]),
        DecodedMedia(
            arrays.get("video"), arrays.get("audio"), said["fps"], said["start_s"],
            View(first, (row, column)), planes, arrays.get("references"),
        ),
    )  # fmt: skip
