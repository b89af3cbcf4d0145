"""The mel codec: levels where the sound is, and sound whose levels are those of the latents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kinodit.models.encoders.base import EncoderError, SoundFormat, build_audio_codec
from kinodit.models.encoders.mel import MelCodec, MelConfig
from kinodit.models.errors import ConfigError

CPU = torch.device("cpu")
RATE = 8000


def codec(num_channels: int = 1, **settings: float) -> MelCodec:
    config = MelConfig(**{"hop": 128, "window": 512, "num_bands": 24, **settings})  # type: ignore[arg-type]
    built = build_audio_codec(config, CPU, SoundFormat(RATE, num_channels))
    assert isinstance(built, MelCodec)
    return built


def tone(hz: float, seconds: float = 1.024, amplitude: float = 0.5) -> Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    return (amplitude * (2 * math.pi * hz * time).sin())[None]


def test_a_tone_is_loud_where_it_is_and_silence_is_minus_one() -> None:
    ours = codec()
    latents = ours.encode(tone(1000, amplitude=1.0))[:, :, 0, 0]
    assert latents.shape == (24, 64) and latents.dtype == torch.float32
    edges_hz = [
        700 * (10 ** (mel / 2595) - 1)
        for mel in torch.linspace(0, 2595 * math.log10(1 + 4000 / 700), 26).tolist()
    ]
    loudest = int(latents[:, 32].argmax())
    assert edges_hz[loudest] < 1000 < edges_hz[loudest + 2]
    # A sine of full scale spreads over a band or two: at most 0 dB, and within 6 dB of it.
    assert 1 - 2 * 6 / 80 < float(latents[:, 32].max()) <= 1.001
    halved = ours.encode(tone(1000, amplitude=0.5))[loudest, 32]
    assert math.isclose(float(latents[loudest, 32] - halved), 2 * 6.0206 / 80, abs_tol=1e-4)
    assert bool((ours.encode(torch.zeros(1, 1024)) == -1).all())


def test_frames_are_centred_on_their_own_samples() -> None:
    sound = torch.zeros(1, 1280)
    sound[0, 4 * 128 + 64] = 1.0
    level = codec().encode(sound)[:, :, 0, 0].mean(0)
    assert int(level.argmax()) == 4
    assert torch.allclose(level[:4].flip(0), level[5:9], atol=0.05)


@pytest.mark.parametrize("num_channels", [1, 2])
def test_sound_has_the_levels_that_it_was_made_of(num_channels: int) -> None:
    ours = codec(num_channels)
    parts = [tone(300) * torch.linspace(0, 1, 8192), tone(900, amplitude=0.3)]
    sound = torch.cat([torch.cat(parts, 1)] * num_channels)
    latents = ours.encode(sound)
    made = ours.decode(latents)
    assert made.shape == sound.shape and made.dtype == torch.float32
    assert torch.equal(made, ours.decode(latents)), "phases are keyed"
    loud = latents > 1 - 2 * 30 / 80
    error_db = (ours.encode(made) - latents)[loud].abs().mean() * 40
    assert float(error_db) < 0.8


def test_silence_comes_back_as_silence() -> None:
    ours = codec()
    sound = torch.cat([torch.zeros(1, 4096), tone(600, 0.512), torch.zeros(1, 4096)], 1)
    made = ours.decode(ours.encode(sound))
    assert float(made[:, :3584].abs().max()) < 0.01 and float(made[:, 8704:].abs().max()) < 0.01
    assert float(made[:, 4608:7680].abs().max()) > 0.3
    assert bool((ours.decode(torch.full((24, 8, 1, 1), -1.0)) == 0).all())


def test_latents_have_the_mean_and_deviation_that_are_taken_from_them() -> None:
    plain, ours = codec(), codec(mean=-0.9, std=0.2)
    sound = torch.cat([torch.zeros(1, 4096), tone(600, 0.512)], 1)
    levels, latents = plain.encode(sound), ours.encode(sound)
    assert torch.allclose(latents * 0.2 - 0.9, levels, atol=1e-6)
    assert torch.allclose(ours.decode(latents), plain.decode(levels), atol=1e-4)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="two hops"):
        MelConfig(hop=600, window=1024)
    with pytest.raises(ConfigError, match="floor_db"):
        MelConfig(floor_db=0.0)
    with pytest.raises(ConfigError, match="std above 0"):
        MelConfig(std=0.0)
    with pytest.raises(ConfigError, match="min_hz < max_hz"):
        MelConfig(min_hz=500, max_hz=400)
    with pytest.raises(EncoderError, match=r"max_hz is 5000, above half of data.audio_rate=8000"):
        codec(max_hz=5000)
    with pytest.raises(EncoderError, match="bands lie between two frequencies"):
        codec(num_bands=200)
    with pytest.raises(EncoderError, match=r"\[24, t, 1, 1\]"):
        codec().decode(torch.zeros(8, 4, 1, 1))


def test_the_fingerprint_follows_what_changes_latents() -> None:
    kinds = [codec(), codec(2), codec(hop=64), codec(floor_db=-60.0), codec(num_bands=20)]
    kinds += [codec(mean=-0.9), codec(std=0.2)]
    assert len({kind.fingerprint for kind in kinds}) == len(kinds)
    # Latents that were written before there was a mean are still found.
    assert codec().fingerprint.startswith("c75bb4ff005671a6")
