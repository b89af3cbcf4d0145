"""A cache on disk gives what encoding would give, in parts, again, and never another's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from kinodit.data.chosen import Chosen
from kinodit.data.config import DataConfig
from kinodit.data.decode import DecodedSample, View
from kinodit.data.encode import Encoders, SampleEncoder
from kinodit.data.encode_shards import EncodeReport, encode_shards
from kinodit.data.latents import (
    CACHE_FILE,
    CacheHeader,
    Encoded,
    LatentCache,
    Origin,
    StaleCacheError,
    decoding_of,
)
from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef
from kinodit.data.reader import SampleError
from kinodit.data.record import Record, RecordMeta
from kinodit.data.spec import DatasetSpec
from kinodit.data.validate import validate
from kinodit.data.writer import WriterError
from kinodit.models.encoders.base import Posterior, TextFeatures
from kinodit.models.random import generator, normal
from tests.data.clips import small_records, write_dataset

COUNT = 10
CONFIG = DataConfig()


def encoded(index: int, logvar: bool = False) -> Encoded:
    source = generator("latents", index)
    mean = normal(source, (2, 1, 3, 3))
    texts = {
        f"{name} s{index:04d}": TextFeatures(normal(source, (2, 3)), normal(source, (2,)))
        for name in ("first", "second")
    }
    posterior = Posterior(mean, normal(source, (2, 1, 3, 3)) if logvar else None)
    return Encoded({"video": posterior}, texts, View(index, (0.5, 0.25)), 6.0, index / 12)


def same(ours: Encoded, theirs: Encoded) -> bool:
    assert (ours.view, ours.fps, ours.start_s) == (theirs.view, theirs.fps, theirs.start_s)
    assert ours.texts.keys() == theirs.texts.keys() and ours.latents.keys() == theirs.latents.keys()
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    for name, posterior in ours.latents.items():
        other = theirs.latents[name]
        pairs += [(posterior.mean, other.mean), (posterior.logvar, other.logvar)]
    for name, text in ours.texts.items():
        pairs += [
            (text.tokens, theirs.texts[name].tokens),
            (text.pooled, theirs.texts[name].pooled),
        ]
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in pairs
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    records = small_records(COUNT)
    return write_dataset(tmp_path_factory.mktemp("s") / "clips", records, shard_bytes=20 << 10)


def make(
    directory: Path,
    source: Dataset,
    part: tuple[int, int] = (0, 1),
    stop_at: int = -1,
    bad: Sequence[int] = (),
    eligible: Any = None,
    content: str = "",
    **origin: Any,
) -> EncodeReport:
    def encode(index: int) -> tuple[str, RecordMeta, Encoded] | str:
        if index == stop_at:
            raise KeyboardInterrupt
        if index in bad:
            return f"sample {index} is bad"
        return f"s{index:04d}", small_records(COUNT)[index].meta, encoded(index, index % 2 == 1)

    made = Origin(content or source.content_hash, decoding_of(CONFIG), {"text": "t", "video": "v"})
    spec = DatasetSpec("clips", source.content_hash, COUNT, eligible=eligible)
    return encode_shards(directory, source, spec, replace(made, **origin), encode, part)


def test_what_was_encoded_is_read_back(source: Dataset, tmp_path: Path) -> None:
    report = make(tmp_path / "c", source)
    assert report == EncodeReport(COUNT, 0, (), True)
    cache = LatentCache(tmp_path / "c", source, CONFIG)
    for index in range(COUNT):
        found = cache.read(index)
        assert found is not None and same(found[1], encoded(index, index % 2 == 1))
        assert found[0] == structs.replace(small_records(COUNT)[index].meta, sha256={})
    cache.close()
    assert validate(tmp_path / "c").problems == (), "a cache is a dataset like others"


def test_parts_and_interruptions_give_the_same_bytes(source: Dataset, tmp_path: Path) -> None:
    assert len(source.manifest.shards) >= 3
    make(tmp_path / "whole", source)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "c", source, (0, 2), stop_at=COUNT - 1)
    again = make(tmp_path / "c", source, (0, 2))
    assert again.num_kept >= 1 and not again.is_complete
    with pytest.raises(StaleCacheError, match=f"no finished cache: it has no {CACHE_FILE}"):
        LatentCache(tmp_path / "c", source, CONFIG)
    assert make(tmp_path / "c", source, (1, 2)).is_complete
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "c").iterdir())
    for name in files:
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert make(tmp_path / "c", source).num_encoded == 0


def test_samples_that_are_not_there_are_known(source: Dataset, tmp_path: Path) -> None:
    report = make(
        tmp_path / "c", source, bad=[2, 3], eligible=Chosen.of(np.array([0, 2, 3, 4, 7, 8]))
    )
    assert report.left_out == ("sample 2 is bad", "sample 3 is bad")
    assert CacheHeader.load(tmp_path / "c").absent == ((1, 3), (5, 2), (9, 1))
    cache = LatentCache(tmp_path / "c", source, CONFIG)
    for index in range(COUNT):
        found = cache.read(index)
        assert (found is not None) == (index in (0, 4, 7, 8))
        assert found is None or same(found[1], encoded(index, index % 2 == 1))
    cache.close()
    with pytest.raises(WriterError, match="would be empty"):
        make(tmp_path / "none", source, bad=range(COUNT))


def test_a_stale_cache_is_refused_with_both_hashes(source: Dataset, tmp_path: Path) -> None:
    make(tmp_path / "c", source, content="0" * 64)
    with pytest.raises(StaleCacheError) as error:
        LatentCache(tmp_path / "c", source, CONFIG)
    assert source.content_hash in str(error.value) and "0" * 64 in str(error.value)
    with pytest.raises(StaleCacheError, match=r"stream video is v2, it was made with v\b"):
        make(tmp_path / "c", source, content="0" * 64, encoders={"text": "t", "video": "v2"})
    make(tmp_path / "d", source)
    with pytest.raises(StaleCacheError, match=r"data\.height is 48, it was made with 64"):
        LatentCache(tmp_path / "d", source, replace(CONFIG, height=48))
    # Which window and crop a step draws is compared sample by sample instead.
    LatentCache(tmp_path / "d", source, replace(CONFIG, window="first", crop="random")).close()


def test_damage_in_a_cache_falls_back_on_the_source(source: Dataset, tmp_path: Path) -> None:
    make(tmp_path / "c", source)
    path, offset, _ = Dataset(tmp_path / "c").locate(1)
    data = bytearray(path.read_bytes())
    data[offset + 600] ^= 1
    path.write_bytes(data)
    cache = LatentCache(tmp_path / "c", source, CONFIG)
    assert cache.read(1) is None and cache.read(2) is not None
    cache.close()


def test_members_that_are_not_ours_are_bad_samples() -> None:
    meta = RecordMeta(id="x", modality="video")
    whole = encoded(1).to_members(small_records(2)[1].meta)
    for members in (
        {},
        {**whole, "latent.safetensors": b"\xff" * 100},
        {**whole, "text.safetensors": b""},
        {**whole, "latent.safetensors": whole["text.safetensors"]},
    ):
        with pytest.raises(SampleError, match="'x' are damaged"):
            Encoded.of(Record("x", meta, members))


class Spread:
    """A codec with a posterior, and an encoder of captions: one token each."""

    latent_channels, stride, fingerprint = 1, (1, 1, 1), "spread"
    token_dim = pooled_dim = max_tokens = 1
    asked = 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return frames, height, width

    def posterior(self, media: Tensor) -> Posterior:
        self.asked += 1
        mean = media[..., :1].permute(3, 0, 1, 2).float()
        return Posterior(mean, torch.full_like(mean, -2.0))

    def encode(self, media: Any) -> Any:
        if isinstance(media, Tensor):
            return self.posterior(media).mean
        return [TextFeatures(torch.full((1, 1), float(len(c))), torch.zeros(1)) for c in media]

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def sample(step: int) -> DecodedSample:
    ref = SampleRef(0, "clips", 3, 0)
    video = torch.full((2, 3, 3, 3), 9, dtype=torch.uint8)
    meta = small_records(4)[3].meta
    view = View(0, (0.5, 0.5))
    return DecodedSample(ref.key(step), ref, "first s0003", video, None, 6.0, 0.0, view, meta)


def test_posteriors_are_drawn_anew_in_every_step_and_alike_from_a_cache() -> None:
    codec = Spread()
    encoder = SampleEncoder(Encoders(codec, codec), 7, 0.0, latent_cache_mib=1)
    kept = encoder.encode_whole(sample(0))
    assert kept.texts.keys() == {"first s0003", "second s0003"}
    restored = Encoded.of(Record("s0003", sample(0).meta, kept.to_members(sample(0).meta)))
    drawn = []
    for step in range(4):
        (raw,) = encoder.encode([sample(step)])
        cached = structs.replace(sample(step), video=None, encoded=restored)
        (ours,) = SampleEncoder(Encoders(codec, codec), 7, 0.0).encode([cached])
        assert torch.equal(ours.latents["video"], raw.latents["video"])
        assert torch.equal(ours.text["text"], raw.text["text"])
        assert ours.seconds == raw.seconds
        drawn.append(raw.latents["video"])
    assert codec.asked == 1, "the posterior is kept, not a draw of it"
    spread = torch.stack(drawn).flatten() - 9
    assert len(spread.unique()) == len(spread)
    assert abs(float(spread.std()) - np.exp(-1.0)) < 0.15


def test_the_header_is_json(source: Dataset, tmp_path: Path) -> None:
    make(tmp_path / "c", source)
    document = json.loads((tmp_path / "c" / CACHE_FILE).read_text())
    assert document["origin"]["encoders"] == {"text": "t", "video": "v"}
    for text in ("{}", "[]", "{", '{"schema": 9}'):
        (tmp_path / "c" / CACHE_FILE).write_text(text)
        with pytest.raises(StaleCacheError):
            CacheHeader.load(tmp_path / "c")
