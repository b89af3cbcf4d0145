"""Latents and text features of a dataset, encoded once: a dataset of its own beside the source.

    DIR/manifest.json, 000000.tar, 000000.idx     as of every dataset; the keys are the source's
    DIR/cache.json                                what they were made of, and which samples lack

A record has KEY.json (the source's), KEY.latent.safetensors with `STREAM.mean` (and `STREAM.logvar`
where the codec has one: then every epoch draws anew), the same of `referenceN` for reference
pictures, and `view`, the part of the source, and
KEY.text.safetensors with `tokens.N` and `pooled.N` of caption N. All float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from kinodit.data.config import DataConfig
from kinodit.data.decode import View
from kinodit.data.manifest import Dataset
from kinodit.data.reader import SampleError, ShardReader
from kinodit.data.record import Record, RecordMeta
from kinodit.models.encoders.base import Posterior, TextFeatures
from kinodit.models.errors import UserError

CACHE_FILE = "cache.json"
SCHEMA = 1
LATENT, TEXT = "latent.safetensors", "text.safetensors"
REFERENCE = "reference"
"""Before the number of a reference picture; no stream has such a name."""


class StaleCacheError(UserError):
    """A cache that was made of other data, by other encoders or for other sizes; names both."""


@dataclass(frozen=True)
class Encoded:
    """What a sample was encoded to.

    latents: stream -> mean [C, t, h, w] and log-variance
    texts:   caption -> its features
    references: the same as `latents` of each reference picture
    """

    latents: Mapping[str, Posterior]
    texts: Mapping[str, TextFeatures]
    view: View
    fps: float
    start_s: float
    references: tuple[Posterior, ...] = ()

    def to_members(self, meta: RecordMeta) -> dict[str, bytes]:
        """Members of a record."""
        place = torch.tensor(
            [self.view.first, *self.view.crop, self.fps, self.start_s], dtype=torch.float64
        )
        latents = {"view": place}
        pictures = {f"{REFERENCE}{n}": one for n, one in enumerate(self.references)}
        for stream, posterior in {**self.latents, **pictures}.items():
            latents[f"{stream}.mean"] = posterior.mean.cpu().contiguous()
            if posterior.logvar is not None:
                latents[f"{stream}.logvar"] = posterior.logvar.cpu().contiguous()
        texts: dict[str, Tensor] = {}
        for number, caption in enumerate(meta.captions):
            features = self.texts[caption.text]
            texts[f"tokens.{number}"] = features.tokens.cpu().contiguous()
            texts[f"pooled.{number}"] = features.pooled.cpu().contiguous()
        return {LATENT: save_safetensors(latents), TEXT: save_safetensors(texts)}

    @classmethod
    def of(cls, record: Record) -> Encoded:
        """The inverse of `to_members`. Raises SampleError."""
        try:
            latents = load_safetensors(bytes(record.members[LATENT]))
            texts = load_safetensors(bytes(record.members[TEXT]))
            first, row, column, fps, start_s = latents.pop("view").tolist()
            known = {
                name: Posterior(latents[f"{name}.mean"], latents.get(f"{name}.logvar"))
                for name in sorted({name.partition(".")[0] for name in latents})
            }
            return cls(
                {name: one for name, one in known.items() if not name.startswith(REFERENCE)},
                {
                    caption.text: TextFeatures(texts[f"tokens.{n}"], texts[f"pooled.{n}"])
                    for n, caption in enumerate(record.meta.captions)
                },
                View(int(first), (row, column)),
                fps,
                start_s,
                tuple(one for name, one in known.items() if name.startswith(REFERENCE)),
            )
        except (KeyError, ValueError, SafetensorError) as error:
            raise SampleError(
                f"cached tensors of sample {record.key!r} are damaged: {error}", record.key
            ) from error


@dataclass(frozen=True)
class Origin:
    """What a cache was made of.

    source:   content hash of the dataset
    decoding: settings that decide what is encoded
    encoders: stream -> fingerprint of its encoder
    """

    source: str
    decoding: dict[str, Any]
    encoders: dict[str, str]

    def differences(self, other: Origin) -> list[str]:
        """What `other` has that is not the same, in words, both values named."""
        found = []
        if self.source != other.source:
            found.append(f"the dataset has content {other.source}, it was made of {self.source}")
        for what, mine, theirs in (
            ("encoder of stream", self.encoders, other.encoders),
            ("setting data.", self.decoding, other.decoding),
        ):
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    space = "" if what.endswith(".") else " "
                    found.append(
                        f"{what}{space}{name} is {theirs.get(name)}, it was made with "
                        f"{mine.get(name)}"
                    )
        return found


def decoding_of(config: DataConfig) -> dict[str, Any]:
    """Settings that decide what a view of a sample is decoded to; which view is stored with it."""
    names = (
        "height", "width", "num_frames", "fps", "pixels", "use_video", "use_audio",
        "audio_rate", "audio_channels", "sizes", "lengths", "side_multiple",
    )  # fmt: skip
    document = {name: getattr(config, name) for name in names}
    document["lengths"] = list(config.lengths)
    if not config.use_audio:
        del document["audio_rate"], document["audio_channels"]
    if config.max_references:
        document["max_references"] = config.max_references
    return document


@dataclass(frozen=True)
class CacheHeader:
    """`cache.json`. `absent`: (first, count) of runs of the source's samples that are not there."""

    origin: Origin
    absent: tuple[tuple[int, int], ...]

    def save(self, directory: Path) -> None:
        """Writes it whole."""
        temporary = directory / f".{CACHE_FILE}.tmp"
        temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}) + "\n")
        temporary.replace(directory / CACHE_FILE)

    @classmethod
    def load(cls, directory: Path) -> CacheHeader:
        """Raises StaleCacheError if there is none."""
        path = directory / CACHE_FILE
        try:
            document = json.loads(path.read_bytes())
            if document["schema"] != SCHEMA:
                raise StaleCacheError(f"{path} is of schema {document['schema']}, not {SCHEMA}")
            absent = tuple((int(first), int(count)) for first, count in document["absent"])
            return cls(Origin(**document["origin"]), absent)
        except FileNotFoundError as error:
            raise StaleCacheError(
                f"{directory} is no finished cache: it has no {CACHE_FILE} (`kinodit data encode` "
                "writes it when all parts are done)"
            ) from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise StaleCacheError(f"{path} cannot be read: {error}") from error


class LatentCache:
    """A cache opened for a dataset. Threads share it."""

    def __init__(self, directory: Path, source: Dataset, config: DataConfig) -> None:
        """Raises StaleCacheError if it was made of other data or for other settings."""
        self.directory = directory
        self.header = CacheHeader.load(directory)
        origin = self.header.origin
        _refuse(
            directory,
            origin.differences(Origin(source.content_hash, decoding_of(config), origin.encoders)),
        )
        self._reader = ShardReader(Dataset(directory))
        self._source = source
        present = np.ones(len(source), dtype=np.bool_)
        for first, count in self.header.absent:
            present[first : first + count] = False
        self._place: NDArray[np.int64] = np.where(present, np.cumsum(present) - 1, -1)
        if int(present.sum()) != len(self._reader.dataset):
            raise StaleCacheError(
                f"{directory} has {len(self._reader.dataset)} samples, {CACHE_FILE} says "
                f"{int(present.sum())}: make it anew"
            )

    def read(self, index: int) -> tuple[RecordMeta, Encoded] | None:
        """What sample `index` of the source was encoded to; None if it is not there, or damaged.

        Raises ShardError if the storage does not answer.
        """
        place = int(self._place[index])
        if place < 0:
            return None
        try:
            record = self._reader.read(place)
            return record.meta, Encoded.of(record)
        except SampleError:
            # What is damaged here is whole at its source, which gives the same.
            return None

    def close(self) -> None:
        """Closes files."""
        self._reader.close()


def check_encoders(config: DataConfig, encoders: Mapping[str, str]) -> None:
    """Refuses caches that other encoders made. encoders: stream -> fingerprint.

    Raises:
        StaleCacheError: with both fingerprints.
    """
    for entry in config.datasets.values():
        if entry.cache:
            origin = CacheHeader.load(Path(entry.cache)).origin
            now = Origin(origin.source, origin.decoding, dict(encoders))
            _refuse(Path(entry.cache), origin.differences(now))


def _refuse(directory: Path, differences: list[str]) -> None:
    if differences:
        raise StaleCacheError(
            f"{directory} is stale: {'; '.join(differences)}. Make it anew with `kinodit data "
            "encode`, or leave it out of the recipe (data.datasets.NAME.cache)"
        )
