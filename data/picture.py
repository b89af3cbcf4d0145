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
        raw = _to_rgb(frame, scaled if quarter_turns % 2 == 0 else scaled[::-1])
        upright = np.rot90(raw, quarter_turns)
        top = round((scaled[0] - height) * self._crop[0])
        left = round((scaled[1] - width) * self._crop[1])
        out[:] = upright[top : top + height, left : left + width]


def _to_rgb(frame: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """`frame` as [rows, columns, 3] of `size`; may share memory with the decoder's buffers."""
    from av.video.reformatter import Interpolation, VideoReformatter

    # One per thread: it keeps its scaler between frames, which PyAV's per-frame conversion
    # (`to_ndarray(format=...)`) builds anew each time at twice the cost of the conversion.
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = VideoReformatter()
    # Bit-exact: the scaler's results then do not depend on the processor's vector instructions.
    picture = _thread.reformatter.reformat(
        frame,
        width=size[1],
        height=size[0],
        format="rgb24",
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
        threads=1,
    )
    plane = picture.planes[0]
    rows: NDArray[np.uint8] = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
    return rows[: size[0], : size[1] * 3].reshape(*size, 3)
