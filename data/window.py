"""Which frames of a clip a recipe takes: exact arithmetic on frame numbers."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import floor

from kinodit.data.config import DecodeConfig

FPS_SCALE = 1000
"""Frame rates are rational numbers of thousandths, as in the index: 29.97 fps is 29970."""


def source_rate(fps: float) -> int:
    """Frames per second as a whole number of thousandths."""
    return round(fps * FPS_SCALE)


def exact_rate(fps_milli: int) -> Fraction:
    """Frames per second that thousandths stand for: 23976 is 24000/1001, as NTSC's rates are."""
    whole = (fps_milli * 1001 + 500_000) // 1_000_000
    ntsc = Fraction(whole * 1000, 1001)
    return ntsc if round(ntsc * FPS_SCALE) == fps_milli else Fraction(fps_milli, FPS_SCALE)


def recipe_rate(config: DecodeConfig) -> Fraction:
    """Frames per second of a recipe's clips, exactly: fps 29.97 means 30000/1001."""
    fps_milli = source_rate(config.fps)
    rate = exact_rate(fps_milli)
    return rate if rate != Fraction(fps_milli, FPS_SCALE) else Fraction(str(config.fps))


def frame_offsets(fps_milli: int, config: DecodeConfig) -> tuple[int, ...]:
    """Source frames to take, counted from the window's first: the one on screen at j / fps.

    Frame j of the clip is source frame floor(j * source rate / fps). A source of a lower rate than
    the recipe's gives some frames twice.

    Args:
        fps_milli: the source's rate, thousandths of a frame per second, above 0.
        config: num_frames and fps of the recipe.
    """
    return _offsets(fps_milli, config.num_frames, config.fps)


@lru_cache(maxsize=4096)
def _offsets(fps_milli: int, num_frames: int, fps: float) -> tuple[int, ...]:
    step = Fraction(fps_milli, FPS_SCALE) / Fraction(str(fps))
    return tuple(floor(j * step) for j in range(num_frames))


def num_window_starts(num_frames: int, fps_milli: int, config: DecodeConfig) -> int:
    """At how many frames of a clip the window may begin; 0 if the clip is too short for it."""
    last = frame_offsets(fps_milli, config)[-1]
    starts = max(0, num_frames - last)
    return min(1, starts) if config.window == "first" else starts


def pick_window(num_frames: int, fps_milli: int, config: DecodeConfig, u: float) -> tuple[int, ...]:
    """The source frames of the window that begins at the fraction `u` (0 <= u < 1) of the choices.

    Empty if the clip is too short.
    """
    starts = num_window_starts(num_frames, fps_milli, config)
    if starts == 0:
        return ()
    first = floor(u * starts)
    return tuple(first + offset for offset in frame_offsets(fps_milli, config))
