"""Folders that Megatron-Energon prepared: their `.nv-meta` is read, and written for them.

    .nv-meta/dataset.yaml   which class of energon reads the samples
    .nv-meta/split.yaml     split -> shards, and what is excluded: shards, and samples as SHARD/KEY
    .nv-meta/.info.json     shard -> number of samples (older ones: .info.yaml)
    .nv-meta/index.sqlite   where samples and their members lie
    NAME.tar.idx            first byte of each sample and the end, 8 bytes each, little-endian

Format: Megatron-Energon 7.4, `flavors/webdataset/{structs,indexing,itar,prepare}.py`.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kinodit.data.braces import BraceError, expanded
from kinodit.data.index import ManifestError, spans
from kinodit.data.indexing import IndexReport
from kinodit.data.manifest import Dataset
from kinodit.data.record import RecordError
from kinodit.data.tar import TarError
from kinodit.data.writer import disk_errors

FOLDER = ".nv-meta"
_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,
    sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,
    content_byte_offset INTEGER, content_byte_size INTEGER);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq
    ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(
    tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


@dataclass(frozen=True)
class NvSplit:
    """A split of a prepared folder.

    files:   its shards in their order
    without: shard -> keys of excluded samples
    counts:  shard -> samples that energon found, excluded ones among them
    """

    files: tuple[str, ...]
    without: dict[str, frozenset[str]]
    counts: dict[str, int]

    def check(self, report: IndexReport) -> None:
        """Raises ManifestError unless the shards held as many samples as energon had found."""
        for shard in report.manifest.shards:
            found = shard.num_samples + len(self.without.get(shard.file, ()))
            found += sum(file == shard.file for file, _ in report.left_out)
            if found != self.counts[shard.file]:
                raise ManifestError(
                    f"{shard.file} holds {found} samples, and {FOLDER} says "
                    f"{self.counts[shard.file]}: it was changed after `energon prepare`, or is "
                    "damaged; prepare it again, or index the folder without --split"
                )


def read_split(directory: Path, split: str) -> NvSplit:
    """The split of that name.

    Raises ManifestError: the folder was not prepared, has no such split, or its shards do not lie
    in the folder itself.
    """
    folder = directory / FOLDER
    info = _document(folder, (".info.json", ".info.yaml"))
    splits = _document(folder, ("split.yaml", "split.json"))
    counts, parts, excludes = (
        info.get("shard_counts"),
        splits.get("split_parts"),
        splits.get("exclude") or [],
    )
    if not isinstance(counts, dict) or not isinstance(parts, dict) or not _are_texts(excludes):
        raise ManifestError(f"{folder} is not what `energon prepare` writes")
    if split not in parts or not _are_texts(parts[split]):
        raise ManifestError(f"{folder} has no split {split!r}; it has {', '.join(map(str, parts))}")
    try:
        excluded, wanted = set(expanded(excludes)), list(expanded(parts[split]))
    except BraceError as error:
        raise ManifestError(f"{folder}: {error}") from error
    files = tuple(dict.fromkeys(name for name in wanted if name not in excluded))
    for file in files:
        if Path(file).name != file or not file.endswith(".tar"):
            raise ManifestError(
                f"{folder}: shard {file!r} does not lie in {directory} itself; a dataset has its "
                "shards in one folder"
            )
        if type(counts.get(file)) is not int:
            raise ManifestError(f"{folder} has no number of samples for shard {file}")
    without: dict[str, set[str]] = {}
    for name in excluded:
        shard, _, key = name.rpartition("/")
        if shard:
            without.setdefault(shard, set()).add(key)
    keys = {shard: frozenset(found) for shard, found in without.items()}
    return NvSplit(files, keys, {file: counts[file] for file in files})


def write_nv_meta(
    dataset: Dataset, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Writes `.nv-meta` and NAME.tar.idx for a local dataset, so that energon reads it unprepared.

    All shards are in split `train`; samples that the dataset's index leaves out are excluded there,
    too. Returns the folder. `progress` is called with (samples done, samples).

    Raises ManifestError if there is a `.nv-meta` already, or a shard is not as indexed.
    """
    directory = dataset.directory
    folder = directory / FOLDER
    if folder.exists():
        raise ManifestError(f"{folder} is there already: move it away, or leave it")
    shards = dataset.manifest.shards
    partial = directory / f"{FOLDER}.partial"
    with disk_errors(directory):
        # What an export that failed has left.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        excluded: list[str] = []
        counts: dict[str, int] = {}
        database = sqlite3.connect(partial / "index.sqlite")
        database.executescript(_TABLES)
        first = 0
        for number, shard in enumerate(shards):
            wanted = {dataset.row(first + place).offset for place in range(shard.num_samples)}
            first += shard.num_samples
            rows = list(_samples(directory / shard.file))
            counts[shard.file] = len(rows)
            excluded += [f"{shard.file}/{key}" for key, start, *_ in rows if start not in wanted]
            _insert(database, number, rows)
            ends = [start for _, start, _, _ in rows] + [rows[-1][2] if rows else 0]
            np.array(ends, "<u8").tofile(directory / f"{shard.file}.idx")
            progress(first, len(dataset))
        database.executescript(_INDEXES)
        database.commit()
        database.close()
        parts = {"train": [shard.file for shard in shards], "val": [], "test": []}
        texts = {
            "dataset.yaml": yaml.safe_dump(
                {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}, sort_keys=False
            ),
            "split.yaml": yaml.safe_dump(
                {"split_parts": parts, "exclude": excluded}, sort_keys=False
            ),
            ".info.json": json.dumps({"energon_version": None, "shard_counts": counts}, indent=2),
            "index.uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, dataset.content_hash)),
        }
        for name, text in texts.items():
            (partial / name).write_text(text)
        partial.rename(folder)
    return folder


Rows = list[tuple[str, int, int, list[tuple[str, int, int]]]]
"""(key, first byte, byte after it, (member, first byte, bytes) ...) of each sample."""


def _samples(path: Path) -> Iterator[tuple[str, int, int, list[tuple[str, int, int]]]]:
    try:
        for span in spans(np.memmap(path, np.uint8, "r").data, whole=True):
            parts = [(name, at.start, at.stop - at.start) for name, at in span.members.items()]
            yield span.key, span.start, span.end, parts
    except (TarError, RecordError) as error:
        raise ManifestError(
            f"{path}: {error}; energon cannot leave out a part of a shard that is damaged"
        ) from error


def _insert(database: sqlite3.Connection, shard: int, rows: Rows) -> None:
    try:
        database.executemany(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
            ((shard, key, n, start, end - start) for n, (key, start, end, _) in enumerate(rows)),
        )
    except sqlite3.IntegrityError as error:
        raise ManifestError(
            "a sample key occurs in two shards, and energon wants keys that are unique in a dataset"
        ) from error
    database.executemany(
        "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
        ((shard, n, *part) for n, (_, _, _, parts) in enumerate(rows) for part in parts),
    )


def _document(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The first of these files that is there, as an object. YAML reads JSON, too."""
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = path.read_text()
            found = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise ManifestError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ManifestError(f"{path} is not an object")
        return found
    raise ManifestError(
        f"{folder} has no {' or '.join(names)}: run `energon prepare`, or index without --split"
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
