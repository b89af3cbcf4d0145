"""Media whose every frame says its own number, made with PyAV: what decoding is checked against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from msgspec import structs

from kinodit.data.manifest import Dataset
from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.writer import DatasetWriter

BITS = 8
RATE = 16_000
Pixels = npt.NDArray[np.uint8]


def barcode(number: int, height: int, width: int) -> Pixels:
    """[height, width, 3] with the number as `BITS` dark or bright bars, most significant left."""
    bits = [(number >> (BITS - 1 - bit)) & 1 for bit in range(BITS)]
    bars = np.repeat(np.array([220 if bit else 35 for bit in bits], np.uint8), width // BITS)
    return np.broadcast_to(bars[None, :, None], (height, width, 3)).copy()


def read_barcode(picture: npt.NDArray[Any]) -> int:
    """The number that a picture of the whole barcode shows, whatever its size."""
    width = picture.shape[1]
    centres = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    row = picture[picture.shape[0] // 2].mean(-1)
    return sum(int(row[c] > 128) << (BITS - 1 - bit) for bit, c in enumerate(centres))


def clip_bytes(
    num_frames: int,
    fps: Fraction | int = 24,
    *,
    height: int = 48,
    width: int = 64,
    keyframe_every: int = 12,
    extension: str = "mp4",
    times: Sequence[int] | None = None,
    onset: int | None = None,
    rotation: int = 0,
    last_lasts: int = 1,
) -> bytes:
    """A video of barcodes. `times`: time of each frame in units of 1 / fps (default 0, 1, 2, ...).

    `onset`: adds sound at `RATE`: silence, then half of full scale from that sample on.
    `last_lasts`: for how long the last frame is shown, in the same units.
    """
    buffer = io.BytesIO()
    codec = "libx264" if extension == "mp4" else "libvpx-vp9"
    container = av.open(buffer, "w", format=extension)
    stream = container.add_stream(codec, rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.gop_size = keyframe_every
    stream.options = {"crf": "8", "threads": "1", "cpu-used": "8"}
    if extension == "mp4":
        stream.options = {"crf": "8", "threads": "1", "bf": "2" if last_lasts == 1 else "0"}
    if rotation:
        stream.set_display_rotation(rotation)
    sound = None
    if onset is not None:
        sound = container.add_stream("aac" if extension == "mp4" else "libopus", rate=RATE)
        sound.layout = "mono"
    for number, when in enumerate(times if times is not None else range(num_frames)):
        frame = av.VideoFrame.from_ndarray(barcode(number, height, width), format="rgb24")
        frame.pts, frame.time_base = when, 1 / Fraction(fps)
        container.mux(stream.encode(frame))
    for packet in stream.encode():
        if packet.pts == when:
            packet.duration = last_lasts
        container.mux(packet)
    if sound is not None and onset is not None:
        total = round(num_frames / Fraction(fps) * RATE)
        _mux_sound(container, sound, _step_sound(total, onset))
    container.close()
    return buffer.getvalue()


def sound_bytes(seconds: float, onset: int, extension: str = "flac") -> bytes:
    """Silence, then a tone of half scale from sample `onset` (at `RATE`) on."""
    buffer = io.BytesIO()
    container = av.open(buffer, "w", format={"opus": "ogg"}.get(extension, extension))
    codec = {"flac": "flac", "wav": "pcm_s16le", "opus": "libopus"}[extension]
    stream = container.add_stream(codec, rate=RATE)
    stream.layout = "mono"
    _mux_sound(container, stream, _step_sound(round(seconds * RATE), onset))
    container.close()
    return buffer.getvalue()


def image_bytes(extension: str, height: int = 48, width: int = 64, number: int = 5) -> bytes:
    """A picture of a barcode."""
    from PIL import Image

    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    Image.fromarray(barcode(number, height, width)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def video_record(key: str, data: bytes, num_frames: int, fps: float, **changes: Any) -> Record:
    """A record of a clip with known facts; `changes` are fields of its metadata."""
    facts: dict[str, Any] = {
        "width": 64,
        "height": 48,
        "fps": fps,
        "num_frames": num_frames,
        "duration_s": num_frames / fps if fps else 0.0,
        "captions": (Caption(f"clip {key}"),),
    }
    extension = changes.pop("extension", "mp4")
    return Record(key, RecordMeta(id=key, modality="video", **facts | changes), {extension: data})


def image_record(key: str, data: bytes, extension: str = "png", **changes: Any) -> Record:
    """A record of a still image."""
    facts: dict[str, Any] = {"width": 64, "height": 48, "captions": (Caption(f"image {key}"),)}
    return Record(key, RecordMeta(id=key, modality="image", **facts | changes), {extension: data})


def sound_record(key: str, data: bytes, seconds: float, extension: str = "flac") -> Record:
    """A record of a sound."""
    meta = RecordMeta(
        id=key, modality="audio", duration_s=seconds, has_audio=True, sample_rate=RATE
    )
    return Record(key, meta, {extension: data})


def described(record: Record, **facts: Any) -> Record:
    """The same record, of which other things are said."""
    return structs.replace(record, meta=structs.replace(record.meta, **facts))


def write_dataset(
    directory: Path, records: Sequence[Record], shard_bytes: int = 64 << 10
) -> Dataset:
    """A dataset of `records`, in small shards."""
    with DatasetWriter(directory, directory.name, shard_bytes) as writer:
        for record in records:
            writer.write(record)
    return Dataset(directory)


def small_records(count: int, num_frames: int = 12, fps: int = 12) -> list[Record]:
    """`count` short clips with two captions each; every fifth is a still image."""
    records = []
    clip = clip_bytes(num_frames, fps, keyframe_every=6)
    for number in range(count):
        key = f"s{number:04d}"
        captions = (Caption(f"first {key}", weight=1), Caption(f"second {key}", weight=3))
        scores, extra = {"motion": number / count}, {"action": "abc"[number % 3]}
        if number % 5 == 4:
            data = image_bytes("png", number=number % 256)
            records.append(image_record(key, data, captions=captions, scores=scores, extra=extra))
        else:
            records.append(
                video_record(
                    key, clip, num_frames, fps, captions=captions, scores=scores, extra=extra
                )
            )
    return records


def _step_sound(total: int, onset: int) -> npt.NDArray[np.float32]:
    samples = np.zeros((1, total), np.float32)
    samples[0, onset:] = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(total - onset) / RATE)
    return samples


def _mux_sound(container: Any, stream: Any, samples: npt.NDArray[np.float32]) -> None:
    resampler = av.AudioResampler(
        format=stream.codec_context.format,
        layout="mono",
        rate=RATE,
        frame_size=stream.codec_context.frame_size or 1024,
    )
    for start in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[:, start : start + 1024]), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
        for piece in resampler.resample(frame):
            container.mux(stream.encode(piece))
    for piece in resampler.resample(None):
        container.mux(stream.encode(piece))
    container.mux(stream.encode())
