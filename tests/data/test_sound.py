"""Sound windows are those of their frames, to half a sample, at any rates and however late."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.config import DecodeConfig
from kinodit.data.decode import decode, pick_view
from kinodit.data.sound import num_audio_samples, sample_at
from kinodit.data.window import exact_rate, pick_window, recipe_rate, source_rate
from kinodit.models.errors import ConfigError
from tests.data.clips import barcode, video_record

NTSC = Fraction(1000, 1001)
RATES = (8_000, 16_000, 44_100, 48_000)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24000 / 1001, 24 * NTSC),
        (30000 / 1001, 30 * NTSC),
        (60000 / 1001, 60 * NTSC),
        (120000 / 1001, 120 * NTSC),
        (15000 / 1001, 15 * NTSC),
        (24.0, Fraction(24)),
        (25.0, Fraction(25)),
        (12.5, Fraction(25, 2)),
        (59.9, Fraction(599, 10)),
    ],
)
def test_thousandths_stand_for_the_rate_they_were_rounded_from(
    fps: float, expected: Fraction
) -> None:
    assert exact_rate(source_rate(fps)) == expected
    shown = DecodeConfig(fps=round(fps, 3))
    assert recipe_rate(shown) == expected


def test_a_recipe_may_have_any_rate() -> None:
    assert recipe_rate(DecodeConfig(fps=0.3)) == Fraction(3, 10)
    assert recipe_rate(DecodeConfig(fps=7.0625)) == Fraction("7.0625")


@given(
    frame=st.integers(0, 3_000_000),
    length=st.integers(1, 5000),
    fps=st.sampled_from([24 * NTSC, 30 * NTSC, Fraction(25), Fraction(24), Fraction(15, 2)]),
    rate=st.sampled_from(RATES),
)
@settings(max_examples=200, deadline=None)
def test_frames_and_samples_are_never_half_a_sample_apart(
    frame: int, length: int, fps: Fraction, rate: int
) -> None:
    """Frames [k, k + n) against samples [a, a + m): both ends, a day into a source."""
    config = DecodeConfig(num_frames=length, fps=round(float(fps), 3), audio_rate=rate)
    first, count = sample_at(frame / fps, rate), num_audio_samples(config)
    assert abs(first - frame / fps * rate) <= Fraction(1, 2)
    assert abs(count - length / fps * rate) <= Fraction(1, 2)
    assert abs(first + count - (frame + length) / fps * rate) <= 1


def clicks(num_frames: int, fps: Fraction, rate: int) -> bytes:
    """A clip whose frame k shows k, with a click in lossless sound when every tenth appears."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = 64, 16, "yuv420p"
        video.options = {"crf": "8", "threads": "1", "bf": "0", "g": "12"}
        sound = container.add_stream("flac", rate=rate)
        sound.layout, sound.format = "mono", "s16"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(barcode(number, 16, 64), format="rgb24")
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(video.encode(frame))
        container.mux(video.encode())
        samples = np.zeros((1, sample_at(num_frames / fps, rate)), np.int16)
        for number in range(0, num_frames, 10):
            samples[0, sample_at(number / fps, rate)] = 30_000
        for start in range(0, samples.shape[1], 4096):
            part = np.ascontiguousarray(samples[:, start : start + 4096])
            piece = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = rate, start, Fraction(1, rate)
            container.mux(sound.encode(piece))
        container.mux(sound.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("fps", [24 * NTSC, 30 * NTSC, Fraction(25)])
@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize("asked", [44_100, 16_000])
def test_a_click_stays_with_its_frame(fps: Fraction, rate: int, asked: int) -> None:
    num_frames = 150
    data = clicks(num_frames, fps, rate)
    record = video_record(
        "clicks", data, num_frames, float(fps), has_audio=True, width=64, height=16
    )
    config = DecodeConfig(
        height=16,
        width=64,
        num_frames=24,
        fps=round(float(fps), 3),
        use_audio=True,
        audio_rate=asked,
    )
    for u in (0.0, 0.31, 0.77, 0.999):
        media = decode(record, config, u)
        first = pick_window(num_frames, source_rate(float(fps)), config, u)[0]
        assert media.audio is not None and media.view.first == first
        assert media.audio.shape == (1, num_audio_samples(config))
        shown = [k for k in range(0, num_frames, 10) if first < k < first + 24]
        assert shown
        for number in shown:
            expected = sample_at((number - first) / fps, asked)
            near = media.audio[0, expected - 8 : expected + 9].abs()
            # Resampling moves a click by less than one of the slower samples.
            assert abs(int(near.argmax()) - 8) <= 1


def test_of_a_video_the_sound_alone() -> None:
    record = video_record("clicks", clicks(50, Fraction(25), 16_000), 50, 25.0, has_audio=True)
    config = DecodeConfig(num_frames=8, fps=8, use_video=False, use_audio=True)
    media = decode(record, config, 0.5)
    assert media.video is None and media.audio is not None
    assert media.audio.shape == (1, 16_000)
    assert media.view == pick_view(record.meta, config, 0.5, (0.0, 0.0))
    # A window of sound begins at any sample, and not where a frame does.
    assert media.view.first == 8_000
    found = np.flatnonzero(media.audio[0].numpy() > 0.5)
    assert found.tolist() == [6_400 * k - 8_000 for k in (2, 3)]
    with pytest.raises(ConfigError, match=r"use_video and data\.use_audio"):
        replace(config, use_audio=False)
