"""Encoding for the demo dataset: h264 and AAC in mp4, still images, sound files.

The same input gives the same bytes: one thread per encoder, no dates in containers.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kinodit.models.errors import MissingExtraError

try:
    import av
except ImportError as error:
    raise MissingExtraError("PyAV", "media", "the demo dataset") from error

SAMPLE_RATE = 16_000
AAC = {"aac_coder": "fast", "aac_tns": "0"}
"""The other coder bursts in pure tones: errors up to 0.35 of full scale, with these below 0.01."""
SAME_BYTES = {"x264-params": "no-mbtree=1"}
"""x264's tree of macroblocks weighs with floats, and on some processors not always alike."""
_CHUNK = 1024


def encode_mp4(
    frames: NDArray[np.uint8], fps: Fraction | int, sound: NDArray[np.float32] | None
) -> bytes:
    """h264 (and AAC) in mp4. frames: [T, H, W, 3], H and W even; sound: [samples] at `SAMPLE_RATE`.

    The picture is close to lossless to the eye (CRF 20).
    """
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "g": str(len(frames))}
        options |= SAME_BYTES
        rate = Fraction(fps)
        video = container.add_stream("libx264", rate=rate, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=AAC)
            audio.bit_rate = 64_000
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            _encode_sound(container, audio, sound)
    return target.getvalue()


def encode_sound(sound: NDArray[np.float32], extension: Literal["flac", "wav", "opus"]) -> bytes:
    """A sound file. sound: [samples] at `SAMPLE_RATE`, within -1 to 1."""
    codecs = {"flac": ("flac", "flac"), "wav": ("wav", "pcm_s16le"), "opus": ("ogg", "libopus")}
    container_name, codec = codecs[extension]
    # An Ogg stream's serial number is drawn by chance unless it may not be.
    options = {"fflags": "+bitexact"}
    target = io.BytesIO()
    with av.open(target, "w", format=container_name, container_options=options) as container:
        stream = container.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        _encode_sound(container, stream, sound)
    return target.getvalue()


def _encode_sound(container: Any, stream: Any, sound: NDArray[np.float32]) -> None:
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=SAMPLE_RATE)
    size = stream.codec_context.frame_size or _CHUNK
    for start in range(0, len(sound), size):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(sound[None, start : start + size]), format="flt", layout="mono"
        )
        frame.sample_rate, frame.pts = SAMPLE_RATE, start
        frame.time_base = Fraction(1, SAMPLE_RATE)
        for piece in resampler.resample(frame):
            container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def encode_image(picture: Image.Image, extension: Literal["jpg", "png", "webp"]) -> bytes:
    """A still image."""
    target = io.BytesIO()
    if extension == "png":
        picture.save(target, "PNG")
    else:
        picture.save(target, "JPEG" if extension == "jpg" else "WEBP", quality=92)
    return target.getvalue()


def decode_frames(data: bytes) -> tuple[NDArray[np.uint8], Fraction, NDArray[np.float32] | None]:
    """All of a short clip: frames [T, H, W, 3], fps, and its sound [samples] at `SAMPLE_RATE`."""
    frames, pieces = [], []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0]
        for frame in container.decode(*container.streams.video, *container.streams.audio):
            if isinstance(frame, av.VideoFrame):
                frames.append(frame.to_ndarray(format="rgb24"))
            else:
                pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
        fps = Fraction(video.average_rate)
    sound = np.concatenate(pieces) if pieces else None
    return np.stack(frames), fps, sound
