"""Media of a record -> pixels and sound of exactly the size, rate and length a recipe asks for.

Shape legend: T frames, H rows, W columns; pixels are uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from kinodit.data.checksums import Bytes
from kinodit.data.colour import Planes
from kinodit.data.config import DecodeConfig
from kinodit.data.container import (
    DecodeError,
    codec_of,
    frames_of,
    open_medium,
    seek_to,
    within_limit,
)
from kinodit.data.picture import CENTRE, Canvas, Crop
from kinodit.data.plan import SampleRef
from kinodit.data.record import Record, RecordMeta
from kinodit.data.sound import decode_audio, num_audio_samples
from kinodit.data.window import FPS_SCALE, exact_rate, pick_window, source_rate
from kinodit.models.tokens import SampleKey

if TYPE_CHECKING:
    from kinodit.data.latents import Encoded

__all__ = ["DecodeError", "DecodedMedia", "DecodedSample", "View", "decode", "pick_view"]


@dataclass(frozen=True)
class View:
    """The part of a source that is decoded.

    first: where the window begins: a frame of a video, a sample (at the recipe's rate) of a sound
    crop:  (row, column) place of the crop, 0 to 1
    """

    first: int
    crop: Crop


@dataclass(frozen=True)
class DecodedMedia:
    """What a record was decoded to.

    video:   [T, H, W, 3] uint8; T is 1 for an image; None for an audio-only sample
    audio:   [channels, samples] float32 in [-1, 1], as long as the frames; None without sound
    fps:     frames per second of `video`
    start_s: where in the source the window begins, seconds
    view:    the same, exactly, and the crop
    planes:  the video, where the recipe leaves it as it is coded; `video` is None then
    references: [R, H, W, 3] uint8, the reference pictures; None if there are none
    """

    video: Tensor | None
    audio: Tensor | None
    fps: float
    start_s: float
    view: View
    planes: Planes | None = None
    references: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of pixels and sound."""
        whole = (x for x in (self.video, self.audio, self.references) if x is not None)
        planes = self.planes.num_bytes if self.planes is not None else 0
        return planes + sum(x.numel() * x.element_size() for x in whole)


class DecodedSample(Struct, frozen=True, gc=False):
    """One sample of a step, ready to be encoded.

    key:     of every random draw for it in this step
    ref:     which sample it is
    caption: the one that was drawn for this step
    meta:    of its record
    view:    the part of the source that was decoded; with `ref.sample_id` it names the pixels
    video, audio, planes, fps, start_s, references: as in `DecodedMedia`; media are None where
    encoded: has what they were encoded to before
    """

    key: SampleKey
    ref: SampleRef
    caption: str
    video: Tensor | None
    audio: Tensor | None
    fps: float
    start_s: float
    view: View
    meta: RecordMeta
    encoded: Encoded | None = None
    planes: Planes | None = None
    references: Tensor | None = None


def decode(
    record: Record,
    config: DecodeConfig,
    window_u: float = 0.0,
    crop_u: Crop = CENTRE,
    into: NDArray[np.uint8] | None = None,
) -> DecodedMedia:
    """Decode a video, an image or a sound.

    The picture is scaled to cover `height` x `width` and cropped. Frame j of a video is the one on
    screen j / fps after the window's first frame (`kinodit.data.window`). The same arguments give
    the same bits.

    Args:
        record: of any modality.
        config: what to decode to.
        window_u: uniform in [0, 1), picks the window among those that fit the source.
        crop_u: (row, column) uniform in [0, 1), picks the crop; unused with `crop: centre`.
        into: flat memory at whose beginning the pixels (or the planes: Y, then U and V) are to lie.

    Raises:
        DecodeError: the medium is damaged, too short or too large, or has nothing the recipe
            uses; the message has the sample's key, the member and the reason.
    """
    crop = CENTRE if config.crop == "centre" else crop_u
    if config.max_references:
        references = _decode_references(record, config)
        media = decode(record, replace(config, max_references=0), window_u, crop_u, into)
        return replace(media, references=references)
    if record.meta.modality == "image" and config.use_video:
        video = _decode_picture(record, config, crop, into=into)
        return DecodedMedia(video, None, config.fps, 0.0, View(0, crop))
    if record.meta.modality == "audio" or not config.use_video:
        return _decode_sound(record, config, window_u)
    return _decode_video(record, config, window_u, crop, into)


def _decode_references(record: Record, config: DecodeConfig) -> Tensor | None:
    pictures = record.references
    if len(pictures) > config.max_references:
        raise DecodeError(
            f"sample {record.key!r} has {len(pictures)} reference pictures; data.max_references "
            f"allows {config.max_references}",
            record.key,
        )
    if not pictures:
        return None
    return torch.cat([_decode_picture(record, config, CENTRE, one) for one in pictures])


def pick_view(meta: RecordMeta, config: DecodeConfig, window_u: float, crop_u: Crop) -> View | None:
    """The view that `decode` takes, without decoding; None if the metadata do not tell."""
    crop = CENTRE if config.crop == "centre" else crop_u
    if meta.modality == "image":
        return View(0, crop)
    if meta.modality == "audio" or not config.use_video:
        known = meta.duration_s > 0
        return View(_sound_start(meta.duration_s, config, window_u), CENTRE) if known else None
    if not meta.num_frames or not meta.fps:
        return None
    wanted = pick_window(meta.num_frames, source_rate(meta.fps), config, window_u)
    return View(wanted[0], crop) if wanted else None


def _decode_picture(
    record: Record,
    config: DecodeConfig,
    crop: Crop,
    medium: tuple[str, Bytes] | None = None,
    into: NDArray[np.uint8] | None = None,
) -> Tensor:
    """The record's picture, or another one of its members, [1, H, W, 3]."""
    with open_medium(record, config, medium) as container:
        stream = _video_stream(container)
        frame = next(iter(container.decode(stream)), None)
        if frame is None:
            raise DecodeError("there is no picture in it")
        canvas = Canvas(1, config, crop, into=into)
        canvas.put(0, frame, stream.sample_aspect_ratio)
    assert canvas.pixels is not None
    return canvas.pixels


def _decode_sound(record: Record, config: DecodeConfig, window_u: float) -> DecodedMedia:
    if not config.use_audio:
        raise DecodeError(
            f"sample {record.key!r} has only sound, which this recipe ignores "
            "(data.use_audio is false)",
            record.key,
        )
    with open_medium(record, config) as container:
        duration_s = record.meta.duration_s or (container.duration or 0) / 1_000_000
        first = _sound_start(duration_s, config, window_u)
        audio = decode_audio(container, Fraction(first, config.audio_rate), config)
    return DecodedMedia(None, audio, config.fps, first / config.audio_rate, View(first, CENTRE))


def _sound_start(duration_s: float, config: DecodeConfig, window_u: float) -> int:
    """The first sample of a window of a sound; 0 where the sound is shorter than the window."""
    spare = round(duration_s * config.audio_rate) - num_audio_samples(config)
    return floor(window_u * (spare + 1)) if spare > 0 and config.window == "random" else 0


def _decode_video(
    record: Record,
    config: DecodeConfig,
    window_u: float,
    crop: Crop,
    into: NDArray[np.uint8] | None,
) -> DecodedMedia:
    with open_medium(record, config) as container:
        stream = _video_stream(container)
        rate = source_rate(record.meta.fps or stream.average_rate or stream.guessed_rate or 0)
        if rate == 0:
            raise DecodeError("its frame rate is not known")
        num_frames = record.meta.num_frames or stream.frames or _frames_by_time(container, rate)
        wanted = pick_window(num_frames, rate, config, window_u)
        if not wanted:
            raise DecodeError(
                f"it has {num_frames} frames at {rate / FPS_SCALE:g} fps, too few for "
                f"{config.num_frames} at {config.fps:g} fps"
            )
        as_planes = config.pixels == "yuv420"
        canvas = Canvas(len(wanted), config, crop, as_planes=as_planes, into=into)
        per_frame = FPS_SCALE / (stream.time_base * rate)
        start = wanted[0] * per_frame
        if start:
            seek_to(container, stream, start)
        filled = _fill(canvas, container, wanted, per_frame, leave_out=True)
        if not filled and start:
            seek_to(container, stream, start)
            filled = _fill(canvas, container, wanted, per_frame)
        if not filled:
            # The file's own index led past the window.
            seek_to(container, stream, Fraction(0))
            _fill(canvas, container, wanted, per_frame, from_start=True)
        origin_s = (stream.start_time or 0) * stream.time_base
    start_s = wanted[0] / exact_rate(rate)
    audio = None
    if config.use_audio and record.meta.has_audio:
        with open_medium(record, config) as container:
            audio = decode_audio(container, origin_s + start_s, config)
    view = View(wanted[0], crop)
    return DecodedMedia(canvas.pixels, audio, config.fps, float(start_s), view, canvas.planes)


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise DecodeError("there is no picture in it")
    stream = container.streams.video[0]
    # One thread: samples are decoded side by side instead, and no bit depends on a thread count.
    codec = codec_of(stream)
    stream.thread_type = "NONE"
    codec.thread_count = 1
    return stream


def _frames_by_time(container: Any, rate: int) -> int:
    return round((container.duration or 0) * rate / FPS_SCALE / 1_000_000)


def _fill(
    canvas: Canvas,
    container: Any,
    wanted: Sequence[int],
    per_frame: Fraction,
    *,
    from_start: bool = False,
    leave_out: bool = False,
) -> bool:
    """Puts the source frames `wanted` (ascending) on the canvas; False if more must be decoded.

    Frame numbers are places on the grid of the source's rate: a frame counts as the number its
    time stamp rounds to, and stays on screen until the next one. At a constant rate that is the
    frame's number; at a variable one, frames are held for as long as they were shown.

    Args:
        canvas: of as many frames as `wanted`.
        container: at or before the first wanted frame.
        wanted: source frames from the start of the stream.
        per_frame: ticks of the stream's clock from one frame to the next.
        from_start: decoding cannot begin earlier, so its first frame stands for those before it.
        leave_out: decode no frame that no other refers to and that is not wanted, if the codec
            tells; False where one of them may be held in place of one that is not there.
    """
    stream = container.streams.video[0]
    origin = stream.start_time or 0
    # Rounding by whole numbers: fractions cost as much as decoding a small frame.
    ticks, frames = per_frame.as_integer_ratio()

    def number_at(pts: int) -> int:
        return (2 * (pts - origin) * frames + ticks) // (2 * ticks)

    numbers = frozenset(wanted) if leave_out and stream.codec_context.name == "h264" else None

    def is_wanted(pts: int | None) -> bool:
        return numbers is None or pts is None or number_at(pts) in numbers

    done, held, shown_until = 0, None, 0
    for frame in within_limit(frames_of(container, stream, is_wanted), canvas.config):
        if frame.pts is None:
            raise DecodeError("its frames have no time stamps")
        number = number_at(frame.pts)
        if held is None and number > wanted[0] and not from_start:
            return False
        while done < len(wanted) and wanted[done] <= number:
            if wanted[done] < number and numbers is not None:
                return False
            exact = wanted[done] == number or held is None
            canvas.put(done, frame if exact else held, stream.sample_aspect_ratio)
            done += 1
        if done == len(wanted):
            return True
        held = frame
        shown_until = number_at(frame.pts + (frame.duration or 0))
    if numbers is not None:
        return False
    while done < len(wanted) and held is not None and wanted[done] < shown_until:
        canvas.put(done, held, stream.sample_aspect_ratio)
        done += 1
    if done < len(wanted):
        raise DecodeError(
            f"{shown_until} frames of it can be decoded, but frame {wanted[-1]} (from 0) was asked "
            "for: its record promises more than is there"
        )
    return True
