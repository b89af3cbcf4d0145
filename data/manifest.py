"""Datasets on disk: `manifest.json`, and an index beside each shard that gives random access.

    DIR/manifest.json      name, shards with counts and checksums, content hash
    DIR/000000.tar         a shard: plain tar, samples by the record contract
    DIR/000000.idx         its index: one `INDEX_DTYPE` row per sample, nothing else

A shard's digest is SHA-256 (schema 1) or BLAKE3 (schema 2); a manifest keeps the kind that it has.
The content hash names the dataset's contents: it depends on the bytes of shards and indexes and on
their order, not on the dataset's name or place.
"""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.data.checksums import Algorithm
from kinodit.data.config import StorageConfig
from kinodit.data.index import INDEX_DTYPE, ManifestError, Row, build_index

__all__ = [
    "INDEX_DTYPE",
    "Dataset",
    "Manifest",
    "ManifestError",
    "Row",
    "ShardEntry",
    "build_index",
    "content_hash",
]

MANIFEST_FILE = "manifest.json"
SCHEMAS: dict[Algorithm, int] = {"sha256": 1, "blake3": 2}
MAX_MAPPED = 1024
PIECE_SAMPLES = 1 << 19
_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}
_ROW = struct.Struct("<" + "".join(_UNSIGNED[INDEX_DTYPE[n].itemsize] for n in Row._fields))
"""A row of `INDEX_DTYPE`."""
_PLACE = struct.Struct("<QI20xI")
"""Offset, size and CRC-32 of one."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest: its file name, counts, its digest and the SHA-256 of its index.

    sha256, blake3: the digest, in hex; the other one is ""
    """

    file: str
    num_samples: int
    num_bytes: int
    sha256: str = ""
    index_sha256: str = ""
    blake3: str = ""

    @property
    def algorithm(self) -> Algorithm:
        """What the digest was made with."""
        return "blake3" if self.blake3 else "sha256"

    @property
    def digest(self) -> str:
        """Names the shard's bytes."""
        return f"blake3:{self.blake3}" if self.blake3 else self.sha256

    @property
    def index_file(self) -> str:
        """File name of the shard's index."""
        return Path(self.file).with_suffix(".idx").name


def content_hash(shards: Iterable[ShardEntry]) -> str:
    """SHA-256 (hex) of the shards' contents in their order."""
    digest = hashlib.sha256(b"kinodit dataset 1\n")
    for shard in shards:
        digest.update(f"{shard.digest} {shard.index_sha256}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Build one with `Manifest.of`, which fills in the content hash."""

    name: str
    shards: tuple[ShardEntry, ...]
    content_hash: str

    @classmethod
    def of(cls, name: str, shards: Iterable[ShardEntry]) -> Manifest:
        """The manifest of `shards` in this order."""
        entries = tuple(shards)
        return cls(name, entries, content_hash(entries))

    @property
    def algorithm(self) -> Algorithm:
        """What the shards' digests were made with."""
        return self.shards[0].algorithm if self.shards else "sha256"

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads `directory/manifest.json`. Raises ManifestError that says what is wrong."""
        path = Path(directory) / MANIFEST_FILE
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise ManifestError(
                f"{directory} is not a dataset: it has no {MANIFEST_FILE} "
                "(`kinodit data pack` makes one, `kinodit data index` adds it to existing shards)"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ManifestError(f"{path} cannot be read: {error}") from error
        return _parse_manifest(path, document)

    def save(self, directory: Path) -> None:
        """Writes `directory/manifest.json`, whole or not at all."""
        path = Path(directory) / MANIFEST_FILE
        temporary = path.with_suffix(".json.tmp")
        other = "sha256" if self.algorithm == "blake3" else "blake3"
        document = {
            **asdict(self),
            "shards": [
                {name: value for name, value in vars(shard).items() if name != other}
                for shard in self.shards
            ],
            "schema": SCHEMAS[self.algorithm],
        }
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(path)


def _parse_manifest(path: Path, document: Any) -> Manifest:
    schemas = list(SCHEMAS.values())
    if not isinstance(document, dict) or document.get("schema") not in schemas:
        raise ManifestError(f"{path} is not a manifest of schema {' or '.join(map(str, schemas))}")
    try:
        shards = tuple(ShardEntry(**shard) for shard in document["shards"])
        name, claimed_hash = document["name"], document["content_hash"]
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{path} does not have the fields of a manifest: {error}") from error
    for shard in shards:
        values = [getattr(shard, part.name) for part in fields(shard)]
        if [type(value) for value in values] != [str, int, int, str, str, str]:
            raise ManifestError(f"{path}: shard {shard.file!r} has a field of a wrong type")
        if Path(shard.file).name != shard.file or not shard.file.endswith(".tar"):
            raise ManifestError(f"{path}: shard {shard.file!r} is not a plain file name NAME.tar")
        if bool(shard.sha256) == bool(shard.blake3) or shard.algorithm != shards[0].algorithm:
            raise ManifestError(
                f"{path}: shard {shard.file!r} must have either sha256 or blake3, like all others"
            )
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{path}: 'name' is {name!r}; it must be a string")
    if claimed_hash != content_hash(shards):
        raise ManifestError(
            f"{path}: its content hash is {content_hash(shards)}, it says {claimed_hash!r}: "
            "it was edited or damaged; run `kinodit data index` to write it anew"
        )
    return Manifest(name, shards, claimed_hash)


@dataclass(frozen=True)
class Piece:
    """A run of samples of a dataset: the number of its first one, and their index rows."""

    first: int
    rows: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> NDArray[Any]:
        """One field of `INDEX_DTYPE`, [len]."""
        values: NDArray[Any] = self.rows[name]
        return values


class Dataset:
    """A dataset opened for random access. Indexes are memory-mapped, shards are not opened.

    url:     where the shards lie if they are not in `directory`; "" if they are
    storage: how they are read there

    Of many shards, only as many indexes are mapped as were used last: a process may not map as many
    files as a dataset may have.

    Raises ManifestError at once for a missing or cut-off shard, and a dataset without samples; for
    an index that is not the one the manifest names, when it is mapped: of few shards, at once.
    """

    def __init__(
        self, directory: Path | str, url: str = "", storage: StorageConfig | None = None
    ) -> None:
        self.directory = Path(directory)
        self.url = url
        self.storage = storage or StorageConfig()
        self.manifest = Manifest.load(self.directory)
        self._index = lru_cache(MAX_MAPPED)(
            partial(_map_index, self.directory, self.manifest.shards)
        )
        # The first sample of each shard, and how many there are in all.
        self._firsts = [0]
        for shard in self.manifest.shards:
            self._check_sizes(shard)
            self._firsts.append(self._firsts[-1] + shard.num_samples)
        for number in range(min(MAX_MAPPED, len(self.manifest.shards))):
            self._index(number)
        if len(self) == 0:
            raise ManifestError(f"dataset {self.directory} is empty: it has no samples")

    @property
    def name(self) -> str:
        """The manifest's name of the dataset."""
        return self.manifest.name

    @property
    def content_hash(self) -> str:
        """The manifest's content hash."""
        return self.manifest.content_hash

    @property
    def is_exact(self) -> bool:
        """Whether which sample comes when is decided by the plan alone."""
        return True

    def __len__(self) -> int:
        return self._firsts[-1]

    def row(self, index: int) -> Row:
        """The index row of sample `index`. Raises IndexError outside 0 to len - 1."""
        return self.found(index)[1]

    def locate(self, index: int) -> tuple[Path, int, int]:
        """(shard file, first byte, number of bytes) of sample `index`."""
        shard, offset, size = self.span(index)
        return self.directory / shard.file, offset, size

    def span(self, index: int) -> tuple[ShardEntry, int, int]:
        """(shard, first byte, number of bytes) of sample `index`."""
        shard, row = self.found(index)
        return shard, row.offset, row.size

    def found(self, index: int) -> tuple[ShardEntry, Row]:
        """The shard that holds sample `index`, and the sample's row in its index."""
        shard, within = self._place(index)
        # Numpy makes a row of Python's numbers in thrice the time.
        row = _ROW.unpack_from(self._index(shard), within * _ROW.size)
        return self.manifest.shards[shard], Row._make(row)

    def shard_of(self, index: int) -> ShardEntry:
        """The shard that holds sample `index`. Raises IndexError outside 0 to len - 1."""
        return self.manifest.shards[self._place(index)[0]]

    def place(self, index: int) -> tuple[ShardEntry, int, int, int]:
        """(shard, first byte, number of bytes, CRC-32 of them) of sample `index`: to read it."""
        number, within = self._place(index)
        offset, size, crc = _PLACE.unpack_from(self._index(number), within * _PLACE.size)
        return self.manifest.shards[number], offset, size, crc

    def place_of(self, shard: ShardEntry) -> str:
        """Path or URL of a shard."""
        return f"{self.url}/{shard.file}" if self.url else str(self.directory / shard.file)

    def pieces(self) -> Iterator[Piece]:
        """The index of all samples, in pieces of whole shards."""
        first, start = 0, 0
        num_shards = len(self.manifest.shards)
        for number, end in enumerate(self._firsts[1:]):
            if end - first < PIECE_SAMPLES and number + 1 < num_shards:
                continue
            shards = range(start, number + 1)
            yield Piece(first, np.concatenate([self._rows(shard) for shard in shards]))
            first, start = end, number + 1

    def column(self, name: str) -> NDArray[Any]:
        """One field of `INDEX_DTYPE` for all samples, in order. A copy, [len]."""
        values = np.empty(len(self), INDEX_DTYPE[name])
        for number, (first, end) in enumerate(pairwise(self._firsts)):
            values[first:end] = self._rows(number)[name]
        return values

    def _rows(self, number: int) -> NDArray[np.void]:
        """The index of a shard, [samples]."""
        count = self.manifest.shards[number].num_samples
        return np.ndarray(count, INDEX_DTYPE, self._index(number))

    def _place(self, index: int) -> tuple[int, int]:
        firsts = self._firsts
        if not 0 <= index < firsts[-1]:
            raise IndexError(f"sample {index} of dataset {self.name!r} with {len(self)} samples")
        # Of shards without samples, which begin where the next does, it is the last.
        shard = bisect_right(firsts, index) - 1
        return shard, index - firsts[shard]

    def _check_sizes(self, shard: ShardEntry) -> None:
        tar, path = self.directory / shard.file, self.directory / shard.index_file
        expected = {path: shard.num_samples * INDEX_DTYPE.itemsize}
        if not self.url:
            expected[tar] = shard.num_bytes
        for file, num_bytes in expected.items():
            if not file.is_file():
                raise ManifestError(f"{file} is missing, but {MANIFEST_FILE} lists it")
            found = file.stat().st_size
            if found != num_bytes:
                raise ManifestError(
                    f"{file} has {found} bytes, but {MANIFEST_FILE} says {num_bytes}: it was cut "
                    "off or changed (`kinodit data validate` shows where)"
                )


def _map_index(directory: Path, shards: Sequence[ShardEntry], number: int) -> memoryview:
    """The bytes of a shard's index."""
    shard = shards[number]
    if shard.num_samples == 0:
        return memoryview(b"")
    path = directory / shard.index_file
    index = np.memmap(path, np.uint8, mode="r").data
    if hashlib.sha256(index).hexdigest() != shard.index_sha256:
        raise ManifestError(
            f"{path} is not the index that {MANIFEST_FILE} names: it was changed; "
            "run `kinodit data index` to write it anew"
        )
    return index
