"""Encoding a recipe's dataset once, with the encoders that its runs will have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedSample
from kinodit.data.decoders import Decoders
from kinodit.data.encode import SampleEncoder
from kinodit.data.encode_shards import EncodeReport, encode_shards
from kinodit.data.latents import Encoded, Origin, decoding_of
from kinodit.data.plan import SampleRef
from kinodit.data.quarantine import instead
from kinodit.data.reader import SampleError, ShardReader
from kinodit.data.record import RecordMeta
from kinodit.data.samples import sized
from kinodit.data.select import open_datasets, plan_spec
from kinodit.models.errors import ConfigError
from kinodit.trainer.config import RunConfig
from kinodit.trainer.encoders import cost_model, fitted_encoders
from kinodit.trainer.parallel.mesh import Mesh


def encode_dataset(
    config: RunConfig,
    name: str,
    directory: Path,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EncodeReport:
    """Encodes one part of a dataset of the recipe into `directory`; "" is the only dataset.

    Every sample is encoded in the view of window=first and crop=centre. Where a run draws another
    view, it decodes the sample as ever. A sample whose decoder hangs or crashes is left out like
    others that are damaged, with data.workers=processes.

    Raises:
        ConfigError: the recipe has no such dataset.
        StaleCacheError, WriterError: as `encode_shards`.
    """
    raw = {key: replace(entry, cache="") for key, entry in config.data.datasets.items()}
    config = replace(config, data=replace(config.data, datasets=raw))
    if not name and len(raw) == 1:
        (name,) = raw
    if name not in raw:
        raise ConfigError(
            f"--dataset {name!r}: the recipe has {', '.join(raw) or 'none'}; name one of them"
        )
    if config.data.datasets[name].stream.shards:
        raise ConfigError(f"dataset {name!r} is streamed: only one that has an index is encoded")
    datasets = open_datasets(config.data)
    with tempfile.TemporaryDirectory() as folder:
        encoders = fitted_encoders(config, Path(folder), datasets, Mesh(device))
    spec = plan_spec(config.data, datasets, cost_model(config, encoders), config.run.seed)
    encoder = SampleEncoder(encoders, config.run.seed, 0.0)
    settings = {item.name: getattr(config.data, item.name) for item in fields(DecodeConfig)}
    decoding = DecodeConfig(**{**settings, "window": "first", "crop": "centre"})
    reader, decoders = ShardReader(datasets[name]), Decoders(config.data.workers)

    def encode(index: int) -> tuple[str, RecordMeta, Encoded] | str:
        ref = instead(spec, SampleRef(0, name, index, 0), index)
        try:
            record = reader.read(index)
            how = decoding if ref.shape is None else sized(decoding, ref.shape)
            media = decoders.decode(record, how)
        except (SampleError, DecodeError) as error:
            return str(error)
        place = (media.fps, media.start_s, media.view)
        sample = DecodedSample(
            ref.key(0),
            ref,
            "",
            media.video,
            media.audio,
            *place,
            record.meta,
            planes=media.planes,
            references=media.references,
        )
        return record.key, record.meta, encoder.encode_whole(sample)

    own = next(item for item in spec.datasets if item.name == name)
    origin = Origin(datasets[name].content_hash, decoding_of(config.data), encoders.fingerprints)
    try:
        return encode_shards(directory, datasets[name], own, origin, encode, part, progress)
    finally:
        reader.close()
        decoders.close()
