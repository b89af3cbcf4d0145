"""The manifest: what a checkpoint consists of, to the byte, and what it was made by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinodit.trainer.state import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = 2
BLOCK_BYTES = 4 << 20
"""Files are hashed in blocks of this size, so that many threads can check one file."""


class BrokenCheckpoint(CheckpointError):
    """Files of a checkpoint are missing or not what was written."""


@dataclass(frozen=True)
class FileRecord:
    """What was written: size in bytes, and in hex the sha256 of its blocks' sha256 in a row."""

    size: int
    sha256: str


class BlockDigest:
    """The digest of a `FileRecord`, of bytes that come piece by piece."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks: list[bytes] = []
        self._block = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """Append `data`, bytes."""
        while data.nbytes:
            piece = data[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._block.update(piece)
            self.size += piece.nbytes
            data = data[piece.nbytes :]
            if self.size % BLOCK_BYTES == 0:
                self._blocks.append(self._block.digest())
                self._block = hashlib.sha256()

    def record(self) -> FileRecord:
        """Of all that was appended."""
        last = [self._block.digest()] if self.size % BLOCK_BYTES else []
        return FileRecord(self.size, join_digests([*self._blocks, *last]))


def join_digests(blocks: Sequence[bytes]) -> str:
    """The digest of a file whose blocks have these, in order."""
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def record_of(data: bytes) -> FileRecord:
    """The record of a file that holds `data`."""
    digest = BlockDigest()
    digest.update(memoryview(data))
    return digest.record()


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    step:     of the run
    files:    by name; every file but the manifest itself
    facts:    sections that say where it comes from: config (without secrets), mesh, versions,
              code (digests of the sources that decide gradients)
    """

    step: int
    files: Mapping[str, FileRecord]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(record.size for record in self.files.values())

    def to_text(self) -> str:
        """Canonical JSON with a digest of itself: no byte of it can change unnoticed."""
        body = {
            "format": FORMAT,
            "block_bytes": BLOCK_BYTES,
            "step": self.step,
            "files": {name: vars(record) for name, record in sorted(self.files.items())},
            "facts": self.facts,
        }
        return _render(body | {"sha256": _digest(body)})

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Read what `to_text` wrote.

        Raises:
            BrokenCheckpoint: a byte differs.
            CheckpointError: it is of another format. Not damaged, so nothing older is gone back to.
        """
        try:
            body = json.loads(text)
            expected = body.pop("sha256")
            actual = _digest(body)
            if actual != expected or _render(body | {"sha256": expected}) != text:
                raise BrokenCheckpoint(
                    f"{where}: expected sha256 {expected[:12]}, found {actual[:12]} (damaged)"
                )
            if (body["format"], body.get("block_bytes")) != (FORMAT, BLOCK_BYTES):
                raise CheckpointError(
                    f"{where}: manifest format {body['format']}, hashed in blocks of "
                    f"{body.get('block_bytes')} bytes, and this version reads format {FORMAT} in "
                    f"blocks of {BLOCK_BYTES}: it is not damaged; go on with the version of "
                    "kinodit that wrote it, or start under another run.name"
                )
            files = {name: FileRecord(**record) for name, record in body["files"].items()}
            return cls(body["step"], files, body["facts"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise BrokenCheckpoint(f"{where}: damaged ({_line(error)})") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises:
        BrokenCheckpoint: there is none, or it is damaged.
    """
    where = f"{path.name}/{MANIFEST_FILE}"
    try:
        text = (path / MANIFEST_FILE).read_bytes().decode()
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{where}: expected a file, found none") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenCheckpoint(f"{where}: cannot be read ({_line(error)})") from error
    manifest = Manifest.from_text(text, where)
    # A folder under another's name would resume at a step that it does not hold.
    named = path.name.split(".")[0].removeprefix("step-")
    if not named.isdigit() or int(named) != manifest.step:
        raise BrokenCheckpoint(f"{where}: expected step {named}, found step {manifest.step}")
    return manifest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _render(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1) + "\n"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
