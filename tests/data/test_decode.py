"""Decoding gives exactly the frames, pixels and sound asked for, or an error that says why."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image, ImageOps

from kinodit.data.colour import MATRICES, Planes
from kinodit.data.config import DecodeConfig
from kinodit.data.decode import DecodedMedia, DecodeError, decode, pick_view
from kinodit.data.meta import MAX_SAMPLE_RATE
from kinodit.data.probe import MediumError, probe
from kinodit.data.record import Record
from kinodit.data.window import pick_window, source_rate
from kinodit.models.errors import ConfigError
from tests.data.clips import (
    RATE,
    barcode,
    clip_bytes,
    described,
    image_bytes,
    image_record,
    read_barcode,
    sound_bytes,
    sound_record,
    video_record,
)

CONFIG = DecodeConfig(height=48, width=64, num_frames=5, fps=8.0)
US = [0.0, 0.13, 0.37, 0.5, 0.77, 0.999]


def numbers(media: DecodedMedia) -> list[int]:
    assert media.video is not None
    return [read_barcode(picture) for picture in media.video.numpy()]


@pytest.fixture(scope="module")
def clip() -> Record:
    """100 frames at 24 fps with B-frames, a keyframe every 12, and a tone from 1.5 s on."""
    data = clip_bytes(100, 24, onset=24_000)
    return video_record("clip", data, 100, 24.0, has_audio=True)


@pytest.mark.parametrize("extension", ["mp4", "webm"])
@pytest.mark.parametrize("fps", [24, 25, 30, Fraction(30_000, 1001)])
def test_frames_are_exactly_those_of_the_window(fps: Fraction | int, extension: str) -> None:
    data = clip_bytes(90, fps, extension=extension, keyframe_every=16)
    record = video_record("clip", data, 90, float(fps), extension=extension)
    for wanted_fps in (8.0, 12.5, 24.0, 60.0):
        config = replace(CONFIG, fps=wanted_fps, num_frames=7)
        for u in US:
            media = decode(record, config, u)
            expected = pick_window(90, source_rate(float(fps)), config, u)
            assert numbers(media) == list(expected)
            assert media.start_s == pytest.approx(expected[0] / fps, abs=1e-4)
            assert media.fps == wanted_fps
            assert media.view == pick_view(record.meta, config, u, (0.5, 0.5))


def test_a_clip_whose_facts_are_unknown_is_decoded_by_what_the_file_says(clip: Record) -> None:
    unknown = described(clip, num_frames=0, fps=0.0, width=0, height=0)
    for u in US:
        assert numbers(decode(unknown, CONFIG, u)) == numbers(decode(clip, CONFIG, u))
    assert pick_view(unknown.meta, CONFIG, 0.5, (0.5, 0.5)) is None


def test_frames_of_a_variable_rate_stay_on_screen_until_the_next() -> None:
    times = [0, 1, 2, 8, 9, 10, 20, 21, 30, 40]
    data = clip_bytes(10, 24, times=times)
    shown = [max(i for i, t in enumerate(times) if t <= moment) for moment in range(41)]
    record = video_record("uneven", data, 41, 24.0)
    config = replace(CONFIG, fps=24.0, num_frames=12)
    for u in US:
        first = pick_window(41, source_rate(24.0), config, u)[0]
        assert numbers(decode(record, config, u)) == shown[first : first + 12]


def test_frames_that_nobody_needs_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip_bytes(60, 24, keyframe_every=60)
    record = video_record("clip", data, 60, 24.0)
    num_decoded: list[int] = []

    def counted(frames: Iterator[Any], config: DecodeConfig) -> Iterator[Any]:
        num_decoded.append(0)
        for frame in frames:
            num_decoded[-1] += 1
            yield frame

    monkeypatch.setattr("kinodit.data.decode.within_limit", counted)
    every = decode(record, replace(CONFIG, fps=24.0, num_frames=60)).video
    some = decode(record, replace(CONFIG, num_frames=20)).video
    assert every is not None and some is not None
    # Two of three frames are not wanted; of those, the ones to which none refers are left out.
    assert num_decoded[0] == 60 and 20 < num_decoded[1] < 50
    assert torch.equal(some, every[::3])


@pytest.mark.parametrize("missing", [9, 21, 57])
def test_a_frame_that_is_missing_is_that_before_it_though_nobody_needed_it(missing: int) -> None:
    times = [time for time in range(60) if time != missing]
    data = clip_bytes(59, 24, times=times, keyframe_every=60)
    record = video_record("gap", data, 60, 24.0)
    shown = [time if time < missing else time - 1 for time in range(0, 60, 3)]
    assert numbers(decode(record, replace(CONFIG, num_frames=20))) == shown


def test_the_last_frame_is_held_for_as_long_as_it_was_shown() -> None:
    config = replace(CONFIG, fps=24.0, num_frames=14, window="first")
    data = clip_bytes(10, 24, last_lasts=4)
    assert numbers(
        decode(video_record("held", data, 13, 24.0), replace(config, num_frames=13))
    ) == [
        *range(10),
        *[9] * 3,
    ]
    with pytest.raises(DecodeError, match="13 frames of it can be decoded, but frame 13"):
        decode(video_record("held", data, 14, 24.0), config)


def test_the_picture_is_scaled_to_cover_and_cropped() -> None:
    # A gradient along each axis tells where every pixel came from.
    rows, columns = np.mgrid[0:90, 0:160]
    picture = np.stack([rows * 2, columns * 1.5, np.zeros_like(rows)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    record = image_record("gradient", buffer.getvalue(), width=160, height=90)

    def corners(config: DecodeConfig, crop: tuple[float, float]) -> Any:
        video = decode(record, config, 0.0, crop).video
        assert video is not None and video.shape == (1, config.height, config.width, 3)
        return video[0, [0, -1], [0, -1], :2].tolist()

    square = DecodeConfig(height=90, width=90)
    assert corners(square, (0.0, 0.0)) == [[0, 52], [178, 186]], "35 columns cut on each side"
    anywhere = replace(square, crop="random")
    assert corners(anywhere, (0.5, 0.0)) == [[0, 0], [178, 133]]
    assert corners(anywhere, (0.5, 0.999)) == [[0, 105], [178, 238]]
    half = np.array(corners(DecodeConfig(height=45, width=45), (0.0, 0.0)))
    assert np.abs(half - [[1, 53], [177, 185]]).max() <= 3
    tall = np.array(corners(DecodeConfig(height=180, width=90), (0.0, 0.0)))
    assert np.abs(tall - [[0, 86], [178, 153]]).max() <= 4


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_still_images_have_one_frame(extension: str) -> None:
    record = image_record("still", image_bytes(extension, number=173), extension)
    media = decode(record, CONFIG)
    assert media.video is not None and media.audio is None
    assert media.video.shape == (1, 48, 64, 3) and media.video.dtype == torch.uint8
    error = np.abs(media.video[0].numpy().astype(int) - barcode(173, 48, 64)).max()
    assert error == 0 if extension == "png" else error < 25
    assert media.view == pick_view(record.meta, CONFIG, 0.0, (0.5, 0.5))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_upright(orientation: int) -> None:
    picture = Image.fromarray(barcode(0b11000000, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    config = DecodeConfig(height=upright.height, width=upright.width)
    video = decode(image_record("photo", buffer.getvalue(), "jpg"), config).video
    assert video is not None
    assert np.abs(video[0].numpy().astype(int) - np.asarray(upright)).max() < 25


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turned_clips_are_upright(rotation: int) -> None:
    record = video_record("turned", clip_bytes(24, 24, rotation=rotation), 24, 24.0)
    height, width = (48, 64) if rotation == 180 else (64, 48)
    video = decode(record, DecodeConfig(height=height, width=width, num_frames=3)).video
    assert video is not None
    expected = np.rot90(barcode(6, 48, 64), rotation // 90)
    assert np.abs(video[2].numpy().astype(int) - expected).max() < 25


def onset(media: DecodedMedia) -> int:
    assert media.audio is not None
    return int(np.argmax(np.abs(media.audio[0].numpy()) > 0.1))


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_sound_is_cut_to_the_seconds_of_the_frames(clip: Record, rate: int) -> None:
    config = replace(CONFIG, use_audio=True, audio_rate=rate, num_frames=8)
    for u in (0.0, 0.1, 0.33):
        media = decode(clip, config, u)
        assert media.audio is not None and media.audio.dtype == torch.float32
        assert media.audio.shape == (1, rate)
        expected = (1.5 - media.start_s) * rate
        if 0 < expected < rate:
            assert abs(onset(media) - expected) < rate * 0.002
        else:
            assert media.audio.abs().max() < 0.01


def test_sound_after_a_seek_is_the_same_as_without(clip: Record) -> None:
    # The last window begins after three seconds; its sound is found by seeking.
    config = replace(CONFIG, use_audio=True, num_frames=4)
    media = decode(clip, config, 0.999)
    assert media.start_s > 3 and media.audio is not None
    long = decode(clip, replace(config, num_frames=31), 0.0)
    assert long.audio is not None
    start = round(media.start_s * RATE)
    expected = long.audio[:, start : start + media.audio.shape[1]]
    assert torch.allclose(media.audio[:, : expected.shape[1]], expected, atol=1e-4)


def test_sound_is_not_opened_unless_it_is_used(clip: Record) -> None:
    assert decode(clip, CONFIG).audio is None
    silent = described(clip, has_audio=False)
    assert decode(silent, replace(CONFIG, use_audio=True)).audio is None


@pytest.mark.parametrize("extension", ["flac", "wav", "opus"])
def test_sounds_alone(extension: str) -> None:
    record = sound_record("sound", sound_bytes(3.0, 20_000, extension), 3.0, extension)
    config = replace(CONFIG, use_audio=True, num_frames=8, audio_channels=2)
    media = decode(record, config, 0.5)
    assert media.video is None and media.audio is not None and media.audio.shape == (2, RATE)
    assert media.start_s == pytest.approx(1.0, abs=1e-3)
    assert abs(onset(media) - 4000) < 20
    assert media.view == pick_view(record.meta, config, 0.5, (0.5, 0.5))
    short = sound_record("short", sound_bytes(0.5, 2000, extension), 0.5, extension)
    padded = decode(short, config, 0.5).audio
    assert (
        padded is not None and padded.shape == (2, RATE) and padded[:, RATE // 2 + 400 :].max() == 0
    )


def test_bits_do_not_depend_on_threads_or_on_what_was_decoded_before(clip: Record) -> None:
    config = replace(CONFIG, height=20, width=33, use_audio=True)
    still = image_record("still", image_bytes("jpg"), "jpg")
    expected = [decode(clip, config, u) for u in US]

    def again(turn: int) -> bool:
        decode(still, replace(CONFIG, height=31, width=17))
        media, first = decode(clip, config, US[turn % len(US)]), expected[turn % len(US)]
        assert media.video is not None and first.video is not None
        assert media.audio is not None and first.audio is not None
        return torch.equal(media.video, first.video) and torch.equal(media.audio, first.audio)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(again, range(24)))


def broken(record: Record, data: bytes) -> Record:
    return structs.replace(record, members=dict.fromkeys(record.members, data))


def test_what_cannot_be_decoded_is_named(clip: Record) -> None:
    whole = bytes(clip.members["mp4"])
    cases: dict[str, Record] = {
        "damaged or not mp4": broken(clip, b"not a clip at all" * 50),
        "data are damaged|are damaged or not mp4": broken(clip, whole[: len(whole) // 2]),
        "holds tensors only": structs.replace(clip, members={"latent.safetensors": b""}),
        "no stream can be found in it": broken(clip, whole.replace(b"trak", b"skip")),
        "frames of it can be decoded, but frame": described(clip, num_frames=5000),
        "too few for 5 at 8 fps": described(clip, num_frames=12),
        "no picture in it": broken(structs.replace(clip, members={"mp4": b""}), _sound_in_mp4()),
    }
    for message, record in cases.items():
        with pytest.raises(DecodeError, match=message) as error:
            decode(record, CONFIG, 0.9)
        assert "sample 'clip'" in str(error.value), message
    for name in ("damaged or not mp4",):
        with pytest.raises(DecodeError, match="member 'mp4'"):
            decode(cases[name], CONFIG)


def test_a_codec_that_is_not_known_is_named(clip: Record) -> None:
    strange = broken(clip, bytes(clip.members["mp4"]).replace(b"avc1", b"zzz1"))
    with pytest.raises(DecodeError, match="codec of its video is not known"):
        decode(strange, CONFIG)
    sound = sound_bytes(0.5, 0, "wav")
    place = sound.index(b"fmt ") + 8
    bad = sound[:place] + b"\xee\xee" + sound[place + 2 :]
    with pytest.raises(DecodeError, match="codec of its audio is not known"):
        decode(sound_record("tone", bad, 0.5, "wav"), replace(CONFIG, use_audio=True))
    with pytest.raises(MediumError, match="codec of its audio is not known"):
        probe("wav", bad)


def test_damage_within_a_sound_is_named_or_does_not_matter() -> None:
    """Frames behind it may have lost their time."""
    sound = sound_bytes(0.5, 100, "flac")
    config, reasons = replace(CONFIG, use_audio=True, num_frames=2), list[str]()
    for place in range(len(sound) // 2, len(sound), 97):
        bad = bytearray(sound)
        bad[place : place + 3] = b"\xd8\x5e\xf4"
        try:
            decode(sound_record("tone", bytes(bad), 0.5), config)
        except DecodeError as error:
            reasons.append(str(error))
    assert any("its sound has no time stamps" in reason for reason in reasons)


@pytest.mark.timeout(20)
def test_no_filter_is_made_for_a_rate_that_no_sound_has() -> None:
    """It would take half a minute, in one call of the library."""
    sound = bytearray(sound_bytes(0.5, 100, "wav"))
    config = replace(CONFIG, use_audio=True, num_frames=2)
    for rate in (MAX_SAMPLE_RATE, MAX_SAMPLE_RATE + 1, 1_351_171_712):
        sound[24:28] = rate.to_bytes(4, "little")
        record = sound_record("tone", bytes(sound), 0.5)
        if rate == MAX_SAMPLE_RATE:
            assert decode(record, config).audio is not None
            continue
        with pytest.raises(DecodeError, match=f"claims {rate} samples a second; 1000000 are"):
            decode(record, config)


def test_pixels_of_another_shape_do_not_make_a_picture_of_any_size() -> None:
    image = image_record("wide", image_bytes("png"))
    with pytest.raises(DecodeError, match=r"would be \d+ x \d+ pixels to cover"):
        decode(image, replace(CONFIG, height=64, width=4, max_pixels=48 * 64))


def _sound_in_mp4() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "script",
    [
        b"ffconcat version 1.0\nfile clip.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nclip.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_script_under_the_name_of_a_clip_is_not_followed(
    clip: Record, script: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip.members["mp4"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecodeError, match="damaged or not mp4"):
        decode(broken(clip, script), CONFIG)


def test_media_under_the_wrong_name_are_decoded_as_what_they_are() -> None:
    webm = clip_bytes(40, 24, extension="webm")
    assert numbers(decode(video_record("clip", webm, 40, 24.0), CONFIG)) == [0, 3, 6, 9, 12]
    photo = decode(image_record("photo", image_bytes("jpg", number=77), "png"), CONFIG)
    assert numbers(photo) == [77]
    tone = sound_record("tone", sound_bytes(1.0, 0, "flac"), 1.0, "wav")
    assert onset(decode(tone, replace(CONFIG, use_audio=True))) < 20


def test_limits_hold_before_anything_is_decoded(clip: Record) -> None:
    with pytest.raises(DecodeError, match=r"64 x 48 pixels; data\.max_pixels allows 3000"):
        decode(clip, replace(CONFIG, max_pixels=3000))
    with pytest.raises(DecodeError, match=r"lasts 4\.\d s; data\.max_duration_s allows 2"):
        decode(clip, replace(CONFIG, max_duration_s=2))
    bomb = io.BytesIO()
    Image.new("L", (9000, 9000)).save(bomb, "PNG")
    with pytest.raises(DecodeError, match=r"above data\.max_pixels|max_pixels allows"):
        decode(image_record("bomb", bomb.getvalue()), replace(CONFIG, max_pixels=1_000_000))


def test_a_sound_in_a_recipe_without_sound_says_so() -> None:
    with pytest.raises(DecodeError, match=r"only sound.*data\.use_audio is false"):
        decode(sound_record("sound", sound_bytes(1.0, 0), 1.0), CONFIG)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("size", [(48, 64), (24, 32), (30, 34), (96, 128), (40, 20)])
def test_planes_show_what_rgb_shows(rotation: int, size: tuple[int, int]) -> None:
    rows, columns = np.mgrid[0:48, 0:64]
    picture = np.stack([rows * 4, columns * 3, 255 - rows * 3], -1).astype(np.uint8)
    record = video_record("slope", slope_clip(picture, rotation), 6, 24.0)
    config = replace(CONFIG, height=size[0], width=size[1], num_frames=2, crop="random")
    for crop in ((0.5, 0.5), (0.0, 0.0), (1.0, 0.6)):
        rgb = decode(record, config, 0.5, crop).video
        media = decode(record, replace(config, pixels="yuv420"), 0.5, crop)
        assert rgb is not None and media.video is None and media.planes is not None
        assert media.num_bytes == rgb.numel() // 2
        late = media.planes.to_rgb(torch.device("cpu"))
        assert late.shape == rgb.shape and late.dtype == torch.uint8
        # Crops lie at even places, and colours are as coarse as they are coded.
        error = (late.int() - rgb.int()).abs()
        assert error.float().mean() < 6 and error.max() < 40


@pytest.mark.parametrize("width", [128, 72])
def test_planes_of_a_clip_in_its_own_size_are_those_that_are_coded(width: int) -> None:
    """Rows of 128 lie without a gap in a decoder's memory; of 72 they do not."""
    buffer, source = io.BytesIO(), np.random.default_rng(width)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        stream.options = {"threads": "1"}
        for _ in range(5):
            pixels = source.integers(0, 256, (48, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        frames = list(container.decode(video=0))
        assert (frames[0].planes[0].line_size == width) is (width == 128)
        coded = np.stack([frame.to_ndarray() for frame in frames])
    record = video_record("noise", buffer.getvalue(), 5, 24.0)
    config = replace(CONFIG, width=width, fps=24.0, num_frames=5, pixels="yuv420")
    planes = decode(record, config).planes
    assert planes is not None
    assert np.array_equal(planes.y.numpy(), coded[:, :48])
    assert np.array_equal(planes.uv.numpy().ravel(), coded[:, 48:].ravel())


def slope_clip(picture: Any, rotation: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "8", "threads": "1"}
        if rotation:
            stream.set_display_rotation(rotation)
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("is_full", [False, True])
def test_colours_are_those_of_their_matrix(matrix: str, is_full: bool) -> None:
    # White, black and the primaries of R'G'B' by BT.601-7 table 3 and BT.709-6 section 3.
    red, blue = MATRICES[matrix]
    colours = torch.tensor(
        [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50]]
    ).double()
    y = colours @ torch.tensor([red, 1 - red - blue, blue]).double()
    u, v = (colours[:, 2] - y) / (2 * (1 - blue)), (colours[:, 0] - y) / (2 * (1 - red))
    if not is_full:
        y, u, v = 16 + y * 219 / 255, u * 224 / 255, v * 224 / 255
    flat = torch.stack([y, u + 128, v + 128]).round().clamp(0, 255).to(torch.uint8)
    planes = Planes(
        flat[0].reshape(-1, 1, 1).expand(-1, 2, 4).contiguous(),
        flat[1:].T.reshape(-1, 2, 1, 1).expand(-1, 2, 1, 2).contiguous(),
        matrix,
        is_full,
    )
    rgb = planes.to_rgb(torch.device("cpu"))
    assert rgb.shape == (6, 2, 4, 3)
    assert (rgb.double() - colours.reshape(6, 1, 1, 3)).abs().max() <= 2


def test_planes_want_even_sizes_and_stills_stay_rgb(clip: Record) -> None:
    with pytest.raises(ConfigError, match="both are even"):
        replace(CONFIG, height=31, pixels="yuv420")
    config = replace(CONFIG, pixels="yuv420", num_frames=20)
    still = decode(image_record("still", image_bytes("png")), config)
    assert still.video is not None and still.planes is None
    media = decode(clip, config)
    assert media.planes is not None
    shown = [read_barcode(p) for p in media.planes.to_rgb(torch.device("cpu")).numpy()]
    assert shown == list(pick_window(100, source_rate(24.0), config, 0.0))
