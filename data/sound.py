"""Decoded sound at the recipe's rate, cut to exactly the seconds of the frames it goes with."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain
from math import floor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError, codec_of, seek_to, within_limit
from kinodit.data.meta import MAX_SAMPLE_RATE
from kinodit.data.window import recipe_rate

PREROLL_S = 0.5
"""How far before the window decoding begins after a seek: codecs need a few packets to settle
(Opus asks for 80 ms, RFC 7845 section 4.6)."""


def num_audio_samples(config: DecodeConfig) -> int:
    """Sound samples per channel that belong to the frames of one clip: their time, rounded."""
    return sample_at(config.num_frames / recipe_rate(config), config.audio_rate)


def sample_at(time_s: Fraction, rate_hz: int) -> int:
    """The sample that is nearest to a time; of two, the later one."""
    return floor(time_s * rate_hz + Fraction(1, 2))


def decode_audio(container: Any, start_s: Fraction, config: DecodeConfig) -> Tensor:
    """[channels, samples] float32: the container's sound during a clip that begins at `start_s`.

    It begins with the sample nearest to that time, in whole numbers at any rates, so that sound and
    frames are never further apart than half a sample, however late in a source. Where the source
    has no sound (it starts later or ends sooner), there is silence.
    """
    import av

    if not container.streams.audio:
        raise DecodeError("there is no sound in it")
    stream = container.streams.audio[0]
    codec_of(stream).thread_count = 1
    rate, total = config.audio_rate, num_audio_samples(config)
    first = sample_at(start_s, rate)
    out: NDArray[np.float32] = np.zeros((config.audio_channels, total), dtype=np.float32)
    if start_s > 2 * PREROLL_S:
        seek_to(container, stream, (start_s - Fraction(PREROLL_S)) / stream.time_base)
    layout = "mono" if config.audio_channels == 1 else "stereo"
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    for source in chain(within_limit(container.decode(stream), config), [None]):
        for frame in resampled(resampler, source):
            if frame.pts is None or frame.time_base is None:
                raise DecodeError("its sound has no time stamps")
            start = sample_at(frame.pts * frame.time_base, rate) - first
            _place(out, frame.to_ndarray(), start)
            if start >= total:
                return torch.from_numpy(out)
    return torch.from_numpy(out)


def resampled(resampler: Any, frame: Any) -> list[Any]:
    """What `av.AudioResampler` makes of a frame, or of the end (None). Raises DecodeError."""
    import av

    # The filter of a rate that no sound has takes minutes to work out, and cannot be interrupted.
    if frame is not None and frame.sample_rate > MAX_SAMPLE_RATE:
        raise DecodeError(
            f"its sound claims {frame.sample_rate} samples a second; {MAX_SAMPLE_RATE} are allowed"
        )
    try:
        frames: list[Any] = resampler.resample(frame)
    except av.FFmpegError:
        raise
    except ValueError as error:
        # PyAV's own; FFmpeg's errors are ValueErrors, too.
        raise DecodeError("its sound changes rate, layout or format on the way") from error
    return frames


def _place(out: NDArray[np.float32], block: NDArray[np.float32], start: int) -> None:
    """Copies the part of `block` that lies within `out` when it begins at `start`."""
    low, high = max(0, start), min(out.shape[1], start + block.shape[1])
    if low < high:
        out[:, low:high] = block[:, low - start : high - start]
