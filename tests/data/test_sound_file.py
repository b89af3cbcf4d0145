"""Files of sound come back as they were, as the same bytes each time; pictures show their sound."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kinodit.data.media import write_mp4
from kinodit.data.sound_file import pcm16, read_sound, spectrogram, write_sound

RATE = 16_000


def tone(hz: float, num_channels: int = 1, num_samples: int = RATE) -> torch.Tensor:
    time = torch.arange(num_samples) / RATE
    scale = torch.linspace(0.5, 0.25, num_channels)[:, None]
    return scale * torch.sin(2 * torch.pi * hz * time)[None]


@pytest.mark.parametrize("ending", ["wav", "flac"])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_sound_of_16_bits_comes_back(tmp_path: Path, ending: str, num_channels: int) -> None:
    sound = tone(440, num_channels, 10_001)
    for name in ("a", "b"):
        write_sound(tmp_path / f"{name}.{ending}", sound, RATE)
    back, rate = read_sound(tmp_path / f"a.{ending}")
    assert rate == RATE and back.dtype == np.float32
    assert np.array_equal(back * 32768, pcm16(sound))
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    with av.open(str(tmp_path / f"a.{ending}")) as container:
        context = container.streams.audio[0].codec_context
        assert (context.sample_rate, context.channels) == (RATE, num_channels)


def test_what_is_beyond_full_scale_is_cut() -> None:
    assert pcm16(torch.tensor([[-1.5, -1.0, 0.0, 1.0, 2.0]])).tolist() == [
        [-32768, -32768, 0, 32767, 32767]
    ]


@pytest.mark.parametrize("rate", [8000, 10_000, 44_100])
def test_sound_in_an_mp4_begins_when_it_should(tmp_path: Path, rate: int) -> None:
    """AAC knows few rates, and begins with a block of its own: neither may be heard."""
    sound = np.zeros((1, 2 * rate), np.float32)
    sound[0, rate:] = 0.5 * np.sin(2 * np.pi * 500 * np.arange(rate) / rate)
    video = np.zeros((16, 16, 16, 3), np.uint8)
    write_mp4(tmp_path / "a.mp4", video, 8.0, (sound, rate))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        heard = [(float(f.pts * f.time_base), f.to_ndarray()[0]) for f in container.decode(stream)]
        found_rate = stream.codec_context.sample_rate
    for start_s, block in heard:
        loud = np.flatnonzero(np.abs(block) > 0.2)
        if len(loud):
            assert abs(start_s + loud[0] / found_rate - 1.0) < 0.004
            break
    else:
        pytest.fail("the tone is not there")


@pytest.mark.parametrize("rate", [4000, 16_000, 44_100])
def test_a_spectrogram_is_bright_when_and_where_the_tone_is(rate: int) -> None:
    sound = torch.zeros(1, 2 * rate)
    sound[0, rate:] = 0.5 * torch.sin(2 * torch.pi * 700 * torch.arange(rate) / rate)
    picture = spectrogram(sound, rate, 100, 48)
    assert picture.shape == (48, 100, 3) and picture.dtype == np.uint8
    light = picture.astype(int).sum(-1)
    assert light[:, :45].max() == light.min() and light[:, 60:90].max() > 2 * light.min() + 300
    rows = light[:, 75]
    low = spectrogram(torch.roll(tone(250), 0), RATE, 100, 48).astype(int).sum(-1)[:, 50]
    assert 0 < int(rows.argmax()) < 47 and int(low.argmax()) > 24, "low sounds are at the bottom"
    assert spectrogram(tone(300, 1, 50), RATE, 100, 48).shape == (48, 100, 3)
