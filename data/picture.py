"""Decoded frames -> pixels of the recipe's size: scaled to cover it, turned upright, cropped."""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError

Crop = tuple[float, float]
CENTRE: Crop = (0.5, 0.5)

_thread = threading.local()


class Canvas:
    """Collects the frames of one clip into uint8 [T, H, W, 3]."""

    def __init__(self, num_frames: int, config: DecodeConfig, crop: Crop) -> None:
        shape = (num_frames, config.height, config.width, 3)
        self._array: NDArray[np.uint8] = np.empty(shape, dtype=np.uint8)
        self.config = config
        self._crop = crop
        self._last: Any = None
        self._last_row = 0

    @property
    def pixels(self) -> Tensor:
        """uint8 [T, H, W, 3]; shares memory with the canvas."""
        return torch.from_numpy(self._array)

    def put(self, row: int, frame: Any, aspect: Fraction | None) -> None:
        """Writes `frame` (av.VideoFrame) as frame `row`; `aspect` is width / height of a pixel."""
        if frame is self._last:
            self._array[row] = self._array[self._last_row]
        else:
            self._convert(frame, aspect, self._array[row])
        self._last, self._last_row = frame, row

    def _convert(self, frame: Any, aspect: Fraction | None, out: NDArray[np.uint8]) -> None:
        if frame.is_corrupt:
            raise DecodeError(f"its frame at {frame.time} s is damaged")
        quarter_turns = round(frame.rotation / 90) % 4
        height, width = out.shape[:2]
        source = (frame.height, round(frame.width * (aspect or 1)))
        if quarter_turns % 2:
            source = source[::-1]
        scale = max(height / source[0], width / source[1])
        scaled = (max(height, round(source[0] * scale)), max(width, round(source[1] * scale)))
        raw = _scaler().to_rgb(frame, scaled if quarter_turns % 2 == 0 else scaled[::-1])
        upright = np.rot90(raw, quarter_turns) if quarter_turns else raw
        top = round((scaled[0] - height) * self._crop[0])
        left = round((scaled[1] - width) * self._crop[1])
        out[:] = upright[top : top + height, left : left + width]


class _Scaler:
    """Scales frames and converts them to RGB, keeping its tables from one frame to the next.

    PyAV's own per-frame conversion (`to_ndarray(format=...)`) builds them anew each time, at twice
    the cost of the conversion itself.
    """

    def __init__(self) -> None:
        from av import VideoFormat
        from av.video.reformatter import Interpolation, VideoReformatter

        self._reformatter = VideoReformatter()
        self._rgb = VideoFormat("rgb24")
        # Bit-exact: results must not depend on the processor. Exact rounding is free when scaling,
        # but where only colours are converted it switches off a path that is ten times as fast.
        self._keep = Interpolation.BITEXACT | Interpolation.BICUBIC
        self._enlarge = self._keep | Interpolation.ACCURATE_RND
        self._shrink = Interpolation.BITEXACT | Interpolation.ACCURATE_RND | Interpolation.AREA

    def to_rgb(self, frame: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
        """`frame` as [rows, columns, 3] of `size`; a view of the picture's own memory."""
        how = self._keep
        if size[0] < frame.height:
            how = self._shrink
        elif size != (frame.height, frame.width):
            how = self._enlarge
        picture = self._reformatter.reformat(
            frame, width=size[1], height=size[0], format=self._rgb, interpolation=how, threads=1
        )
        plane = picture.planes[0]
        return np.ndarray((*size, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))


def _scaler() -> _Scaler:
    """This thread's scaler."""
    if not hasattr(_thread, "scaler"):
        _thread.scaler = _Scaler()
    scaler: _Scaler = _thread.scaler
    return scaler
