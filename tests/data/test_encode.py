"""Encoding is keyed and cached; neither a cache nor a neighbour changes a bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from kinodit.data.cache import BoundedCache
from kinodit.data.decode import DecodedSample, View
from kinodit.data.encode import Encoders, SampleEncoder
from kinodit.data.packing import PackSpec, StreamSpec, pack
from kinodit.data.plan import SampleRef
from kinodit.data.record import RecordMeta
from kinodit.models.encoders.base import SoundFormat, TextFeatures
from kinodit.models.encoders.mdct import MdctConfig
from kinodit.models.errors import ConfigError


class Words:
    """One token for each word; counts what it is asked."""

    token_dim, pooled_dim, max_tokens, fingerprint = 3, 2, 9, "words"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        assert len(captions) == 1, "captions are encoded alone"
        self.asked += captions
        words = captions[0].split() or [""]
        tokens = torch.tensor([[len(word), ord(word[0]) if word else 0, 1.0] for word in words])
        return [TextFeatures(tokens, tokens.mean(0)[:2])]


class Halves:
    """Latents of two channels: every second frame, row and column."""

    latent_channels, stride, fingerprint = 2, (2, 2, 2), "halves"

    def __init__(self) -> None:
        self.asked = 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return frames // 2, height // 2, width // 2

    def encode(self, video: Tensor) -> Tensor:
        self.asked += 1
        return video[::2, ::2, ::2, :2].permute(3, 0, 1, 2).float()

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def sample(slot: int = 0, step: int = 0, **changes: Any) -> DecodedSample:
    ref = SampleRef(slot, "clips", slot % 4, 0)
    fields: dict[str, Any] = {
        "key": ref.key(step),
        "ref": ref,
        "caption": f"clip number {slot % 4}",
        "video": torch.full((4, 8, 8, 3), slot % 4, dtype=torch.uint8),
        "audio": None,
        "fps": 8.0,
        "start_s": 0.0,
        "view": View(0, (0.5, 0.5)),
        "meta": RecordMeta(id="clip", modality="video"),
    }
    return DecodedSample(**fields | changes)


def encoder(
    dropout: float = 0.0, seed: int = 0, **caches: Any
) -> tuple[SampleEncoder, Words, Halves]:
    words, halves = Words(), Halves()
    return SampleEncoder(Encoders(words, halves), seed, dropout, **caches), words, halves


def test_a_sample_becomes_latents_text_and_conditions() -> None:
    (encoded,) = encoder()[0].encode([sample(2)])
    assert encoded.key == sample(2).key
    assert encoded.latents["video"].shape == (2, 2, 4, 4)
    assert encoded.latents["video"].unique().tolist() == [2]
    assert encoded.seconds == {"video": 0.25}
    assert encoded.text["text"].tolist() == [[4, 99, 1], [6, 110, 1], [1, 50, 1]]
    assert encoded.conditions["text_pooled"].shape == (2,)


def test_captions_are_encoded_once_and_one_by_one() -> None:
    encode, words, _ = encoder()
    encode.encode([sample(slot) for slot in range(12)])
    assert sorted(words.asked) == [f"clip number {n}" for n in range(4)]
    small, asked, _ = encoder(caption_cache_mib=0)
    small.encode([sample(slot) for slot in range(12)])
    assert len(asked.asked) == 12


def test_the_empty_caption_is_given_to_the_wanted_share_by_key() -> None:
    empty = encoder()[0].text("")[0]["text"]

    def dropped(seed: int, order: int) -> list[bool]:
        samples = [sample(slot, step) for step in range(20) for slot in range(50)][::order]
        texts = [e.text["text"] for e in encoder(0.2, seed)[0].encode(samples)]
        return [torch.equal(text, empty) for text in texts][::order]

    first = dropped(0, 1)
    # Four standard errors of a share of 0.2 among 1000.
    assert abs(sum(first) / 1000 - 0.2) < 0.051
    assert dropped(0, -1) == first, "the draw is keyed, not taken from a sequence"
    assert dropped(1, 1) != first
    assert all(
        torch.equal(e.text["text"], empty)
        and torch.equal(e.conditions["text_pooled"], torch.zeros(2))
        for e in encoder(1.0)[0].encode([sample(slot) for slot in range(4)])
    )
    assert not any(
        torch.equal(e.text["text"], empty) for e in encoder(0.0)[0].encode([sample(1), sample(2)])
    )


def several(dropout: float = 0.0, **text_dropout: float) -> tuple[SampleEncoder, list[Words]]:
    """Three encoders of the same captions."""
    words = [Words(), Words(), Words()]
    encoders = Encoders(words[0], Halves(), more={"clip": words[1], "clip_2": words[2]})
    return SampleEncoder(encoders, 0, dropout, text_dropout=text_dropout), words


def test_several_encoders_read_the_same_caption() -> None:
    encode, words = several()
    (encoded,) = encode.encode([sample(2)])
    assert list(encoded.text) == ["text", "clip", "clip_2"]
    assert list(encoded.conditions) == ["text_pooled", "clip_pooled", "clip_2_pooled"]
    assert all(one.asked == ["clip number 2"] for one in words)
    assert set(encode.encoders.fingerprints) == {"text", "clip", "clip_2", "video"}
    assert len(encode.encoders.all) == 4


def test_encoders_are_dropped_each_by_itself() -> None:
    encode, _ = several(text=0.5, clip=0.3)
    empty = encode.text("")[0]["text"]
    samples = [sample(slot, step) for step in range(40) for slot in range(50)]
    found = encode.encode(samples)
    is_empty = {name: [torch.equal(e.text[name], empty) for e in found] for name in found[0].text}
    shares = {name: sum(values) / len(found) for name, values in is_empty.items()}
    # Four standard errors of a share among 2000.
    assert abs(shares["text"] - 0.5) < 0.045 and abs(shares["clip"] - 0.3) < 0.041
    assert shares["clip_2"] == 0
    both = [one and other for one, other in zip(is_empty["text"], is_empty["clip"], strict=True)]
    assert abs(sum(both) / len(found) - 0.15) < 0.032
    for encoded, dropped in zip(found, is_empty["clip"], strict=True):
        assert torch.equal(encoded.conditions["clip_pooled"], torch.zeros(2)) == dropped
    whole, _ = several(1.0)
    assert all(torch.equal(t, empty) for e in whole.encode([sample(1)]) for t in e.text.values())


def test_latents_are_cached_by_what_was_decoded() -> None:
    encode, _, halves = encoder(latent_cache_mib=1)
    first, again = encode.encode([sample(1), sample(5)])
    assert halves.asked == 1 and torch.equal(first.latents["video"], again.latents["video"])
    elsewhere = structs.replace(sample(1), view=View(3, (0.5, 0.5)), video=sample(2).video)
    (other,) = encode.encode([elsewhere])
    assert halves.asked == 2 and other.latents["video"].unique().tolist() == [2]
    plain, _, counted = encoder()
    plain.encode([sample(1), sample(5)])
    assert counted.asked == 2, "off unless asked for"


def test_a_sample_without_a_picture_has_text_only() -> None:
    (encoded,) = encoder()[0].encode([sample(1, video=None)])
    assert encoded.latents == {} and encoded.seconds == {} and len(encoded.text["text"]) == 3


def test_sound_becomes_latents_in_whole_tokens() -> None:
    words, halves = Words(), Halves()
    mdct = MdctConfig(hop=10).build(torch.device("cpu"), SoundFormat(100, 1))
    encoders = Encoders(words, halves, mdct, audio_patch=3)
    sound = torch.linspace(-0.5, 0.5, 95)[None]
    encode = SampleEncoder(encoders, 0, 0.0, latent_cache_mib=1)
    (encoded,) = encode.encode([sample(1, audio=sound)])
    # 95 samples are 10 latent frames, and these 4 tokens of 3.
    assert encoded.latents["audio"].shape == (10, 12, 1, 1)
    back = mdct.decode(encoded.latents["audio"])
    assert torch.allclose(back[:, :95], sound, atol=1e-6)
    assert torch.allclose(back[:, 95:], torch.zeros(1, 25), atol=1e-6)
    assert encoded.seconds == {"video": 0.25, "audio": 0.1}
    (again,) = encode.encode([sample(1, audio=torch.zeros(1, 95))])
    assert torch.equal(again.latents["audio"], encoded.latents["audio"]), "from the cache"
    assert again.latents["video"].shape == encoded.latents["video"].shape
    (alone,) = encode.encode([sample(2, video=None, audio=sound)])
    assert list(alone.latents) == ["audio"] and alone.seconds == {"audio": 0.1}


def test_tokens_of_sound_and_pictures_share_their_seconds() -> None:
    """The position of a token says when it begins, whatever it is of."""
    mdct = MdctConfig(hop=100).build(torch.device("cpu"), SoundFormat(800, 1))
    encoders = Encoders(Words(), Halves(), mdct, audio_patch=2)
    (encoded,) = SampleEncoder(encoders, 0, 0.0).encode([sample(1, audio=torch.zeros(1, 400))])
    streams = StreamSpec("video", 2, (1, 4, 4)), StreamSpec("audio", 100, (2, 1, 1))
    batch = pack([encoded], PackSpec((StreamSpec("text", 3), *streams), {"text_pooled": 2}))
    video, audio = batch.modalities["video"], batch.modalities["audio"]
    assert video.position[:, 0].tolist() == [0.0, 0.25]
    assert audio.position[:, 0].tolist() == [0.0, 0.25]
    assert audio.position[:, 1:].abs().max() == 0


def test_media_that_no_encoder_takes_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"clips:1 .*data\.use_audio=false"):
        encoder()[0].encode([sample(1, audio=torch.zeros(1, 10))])
    with pytest.raises(ConfigError, match=r"clips:1 .*data\.use_video=false"):
        SampleEncoder(Encoders(Words()), 0, 0.0).encode([sample(1)])
    with pytest.raises(ConfigError, match="must be 0 to 1"):
        encoder(1.5)


def test_a_cache_keeps_the_last_used_within_its_bytes() -> None:
    cache = BoundedCache[str, bytes](10, len)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")
    assert cache.get("b") is None and cache.get("a") == b"1234" and cache.held_bytes == 8
    cache.put("a", b"12")
    assert cache.get("a") == b"12" and cache.held_bytes == 6
    cache.put("huge", b"12345678901")
    assert cache.get("huge") is None and cache.held_bytes == 6
