"""Opening media from untrusted bytes: one demuxer per extension, limits before anything decodes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from math import floor
from typing import Any

from kinodit.data.checksums import Bytes
from kinodit.data.config import DecodeConfig
from kinodit.data.record import Record
from kinodit.models.errors import MissingExtraError, UserError

DEMUXERS = {
    "mp4": "mov",
    "webm": "matroska",
    "jpg": "jpeg_pipe",
    "jpeg": "jpeg_pipe",
    "png": "png_pipe",
    "webp": "webp_pipe",
    "flac": "flac",
    "wav": "wav",
    "opus": "ogg",
}
"""FFmpeg's demuxer of each media member. FFmpeg is never left to guess: a playlist or a concat
script under the name of a clip would be opened as what it is, and read the files it names."""

SIGNATURES = (
    (0, b"\x89PNG", "png_pipe"),
    (0, b"\xff\xd8\xff", "jpeg_pipe"),
    (8, b"WEBP", "webp_pipe"),
    (8, b"WAVE", "wav"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (4, b"ftyp", "mov"),
)
"""(offset, bytes, demuxer): media that are of another kind than their name says, and common."""


class DecodeError(UserError):
    """A medium that cannot be decoded to what the recipe asks; names sample, member and reason.

    key: of the sample
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


@contextmanager
def open_medium(
    record: Record, config: DecodeConfig, medium: tuple[str, Bytes] | None = None
) -> Iterator[Any]:
    """The record's medium, or another one of its members, as an open `av` container.

    Whatever goes wrong within the block is raised as DecodeError with the sample's name.

    Raises:
        DecodeError: no medium, not the format its name says, damaged, or above `max_pixels` or
            `max_duration_s` of the recipe.
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("PyAV", "media", "decoding clips") from error
    medium = medium or record.medium
    if medium is None:
        raise DecodeError(f"sample {record.key!r} has no medium: it holds tensors only", record.key)
    name, payload = medium
    where = f"sample {record.key!r}, member {name!r}"
    # FFmpeg decodes a frame to learn a picture's format, so its limit holds from the first byte.
    limits = {"max_pixels": str(config.max_pixels)}
    try:
        kind = demuxer(name.rpartition(".")[2], payload)
        with opened(payload, kind, stream_options=[limits] * 8) as container:
            _check_limits(container, config)
            yield container
    except DecodeError as error:
        raise DecodeError(f"{where}: {error}", record.key) from error.__cause__
    except (av.FFmpegError, OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DecodeError(
            f"{where} cannot be decoded ({reason}): its {len(payload)} bytes are damaged or not "
            f"{name}; `kinodit data validate` finds such samples",
            record.key,
        ) from error


def opened(payload: Bytes, demuxer: str, **options: Any) -> Any:
    """A medium as an open `av.container.InputContainer`, read from memory and nowhere else.

    `demuxer` is FFmpeg's name of it, `options` those of `av.open`.

    Raises:
        DecodeError: it has no streams.
        av.FFmpegError: FFmpeg cannot open it.
    """
    import av

    try:
        return av.open(
            io.BytesIO(payload),
            format=demuxer,
            options={"protocol_whitelist": ""},
            metadata_errors="replace",
            **options,
        )
    except av.FFmpegError:
        raise
    except ValueError as error:
        # PyAV's own, of a header that names no streams; FFmpeg's errors are ValueErrors, too.
        raise DecodeError("no stream can be found in it: its header is damaged") from error


def demuxer(name: str, payload: Bytes) -> str:
    """FFmpeg's demuxer for a member: by its first bytes if they are known, else by its name."""
    for offset, signature, found in SIGNATURES:
        if payload[offset : offset + len(signature)] == signature:
            return found
    return DEMUXERS[name]


def codec_of(stream: Any) -> Any:
    """The stream's `av.codec.CodecContext`. Raises DecodeError where FFmpeg knows no codec."""
    if stream.codec_context is None:
        raise DecodeError(f"the codec of its {stream.type} is not known: its header is damaged")
    return stream.codec_context


def seek_to(container: Any, stream: Any, ticks: Fraction) -> None:
    """Moves to a keyframe at or before `ticks` of the stream's clock, counted from its start.

    A container that cannot seek, or not so far, stays where it is; decoding then begins there.
    """
    import av

    with suppress(av.FFmpegError, OverflowError):
        container.seek((stream.start_time or 0) + floor(ticks), stream=stream)


def frames_of(
    container: Any, stream: Any, is_wanted: Callable[[int | None], bool]
) -> Iterator[Any]:
    """The frames of a video stream from here on, as they are shown.

    A frame that no other refers to is not decoded unless `is_wanted` says so of its time stamp;
    only codecs whose frames say whether others refer to them leave any out.
    """
    codec, now = stream.codec_context, ""
    for packet in container.demux(stream):
        skipped = "DEFAULT" if is_wanted(packet.pts) else "NONREF"
        if skipped != now:
            codec.skip_frame = now = skipped
        yield from packet.decode()


def within_limit(frames: Iterator[Any], config: DecodeConfig) -> Iterator[Any]:
    """`frames` as they are decoded. Raises DecodeError once they have taken `decode_limit_s`."""
    end_s = time.monotonic() + config.decode_limit_s
    for frame in frames:
        if time.monotonic() > end_s:
            raise DecodeError(too_slow(config))
        yield frame


def too_slow(config: DecodeConfig) -> str:
    """What is said of a medium that takes too long."""
    return (
        f"decoding it takes longer than the {config.decode_limit_s:g} s that data.decode_limit_s "
        "allows"
    )


def _check_limits(container: Any, config: DecodeConfig) -> None:
    seconds = (container.duration or 0) / 1_000_000
    if seconds > config.max_duration_s:
        raise DecodeError(
            f"it lasts {seconds:.1f} s; data.max_duration_s allows {config.max_duration_s:g}"
        )
    for stream in container.streams.video:
        if stream.frames > config.max_frames:
            raise DecodeError(
                f"it has {stream.frames} frames; data.max_frames allows {config.max_frames}"
            )
        if stream.codec_context is None:
            continue
        width, height = stream.codec_context.width, stream.codec_context.height
        if width < 1 or height < 1:
            raise DecodeError(
                "its picture size cannot be read: it is damaged, or above data.max_pixels "
                f"({config.max_pixels})"
            )
        if width * height > config.max_pixels:
            raise DecodeError(
                f"it is {width} x {height} pixels; data.max_pixels allows {config.max_pixels}"
            )
