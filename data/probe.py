"""What a medium is: size, length, rate and sound, read from its bytes with PyAV and Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from kinodit.data.checksums import Bytes
from kinodit.data.container import DEMUXERS, DecodeError, codec_of, opened
from kinodit.data.record import MAX_SIDE, MEDIA_MEMBERS, Modality, RecordMeta
from kinodit.models.errors import MissingExtraError, UserError

MAX_PIXELS = 1 << 27


class MediumError(UserError):
    """Bytes that are not the medium they claim to be, or that are damaged."""


@dataclass(frozen=True)
class MediumFacts:
    """Width and height in pixels, fps in frames per second, duration in seconds, rate in Hz."""

    width: int = 0
    height: int = 0
    fps: float = 0.0
    num_frames: int = 0
    duration_s: float = 0.0
    has_audio: bool = False
    sample_rate: int = 0


Probe = Callable[[str, Bytes], MediumFacts]
"""Facts about a medium of an extension, as `probe` finds them: here, or in another process."""


def modality_of(extension: str) -> Modality:
    """The modality of a media member. Raises MediumError for any other extension."""
    for modality, extensions in MEDIA_MEMBERS.items():
        if extension in extensions:
            return modality
    raise MediumError(f"{extension!r} is not the extension of a medium")


def probe(extension: str, data: Bytes) -> MediumFacts:
    """Facts about a medium. All its packets are read, its first frame is decoded.

    Raises MediumError if it cannot be opened or decoded, if packets are missing from its end, or
    if it is larger than any clip may be.
    """
    modality = modality_of(extension)
    if modality == "image":
        return _probe_image(data)
    return _probe_container(extension, data, modality)


def with_facts(meta: RecordMeta, facts: MediumFacts) -> RecordMeta:
    """`meta` with size, length and sound as probed."""
    return structs.replace(meta, **vars(facts))


def _probe_image(data: Bytes) -> MediumFacts:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "media", "reading images") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                _check_size(*image.size)
                image.load()
                return MediumFacts(width=image.width, height=image.height, num_frames=1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediumError(f"it is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MediumError(
            "it is damaged or not a JPEG, PNG or WebP image"
            + (f": {error}" if "BytesIO" not in str(error) else "")
        ) from error


def _probe_container(extension: str, data: Bytes, modality: Modality) -> MediumFacts:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("PyAV", "media", "reading video and sound") from error
    try:
        with opened(data, DEMUXERS[extension]) as container:
            sound = next(iter(container.streams.audio), None)
            sample_rate = codec_of(sound).sample_rate if sound is not None else 0
            streams = container.streams.video if modality == "video" else container.streams.audio
            if not streams:
                raise MediumError(f"there is no {modality} stream in it")
            count, end_s = _count_packets(container, streams[0])
            if modality == "audio":
                return MediumFacts(duration_s=end_s, has_audio=True, sample_rate=sample_rate)
            video = streams[0]
            if video.frames and count < video.frames:
                raise MediumError(f"it is cut off: {count} of {video.frames} frames are there")
            width, height = codec_of(video).width, codec_of(video).height
            _check_size(width, height)
            return MediumFacts(
                width=width,
                height=height,
                fps=float(video.average_rate or video.guessed_rate or 0),
                num_frames=count,
                duration_s=end_s,
                has_audio=sound is not None,
                sample_rate=sample_rate,
            )
    except DecodeError as error:
        raise MediumError(str(error)) from error
    except (OSError, av.FFmpegError) as error:
        raise MediumError(f"it cannot be opened or decoded: {error.strerror}") from error


def _count_packets(container: Any, stream: Any) -> tuple[int, float]:
    """(packets of a stream, seconds from its start to the end of its last packet).

    Decodes until there is one frame; MediumError if there is none.
    """
    count, end_s, decoded = 0, 0.0, False
    for packet in container.demux(stream):
        if packet.size:
            count += 1
            start = packet.pts if packet.pts is not None else packet.dts
            end = (start or 0) + (packet.duration or 0) - (stream.start_time or 0)
            end_s = max(end_s, float(end * packet.time_base))
        if not decoded:
            decoded = bool(packet.decode())
    if not decoded:
        raise MediumError("not one frame of it can be decoded")
    return count, end_s


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise MediumError(
            f"it is {width}x{height}; at most {MAX_SIDE} a side and {MAX_PIXELS} pixels are allowed"
        )
