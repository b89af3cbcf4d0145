"""Decoded frames -> pixels of the recipe's size: scaled to cover it, turned upright, cropped."""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.data.colour import Planes
from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError

Crop = tuple[float, float]
CENTRE: Crop = (0.5, 0.5)
MAX_SPARE = 16
"""How often the pixels of a recipe a picture that covers them may have, and be cropped: a header
that claims pixels of any shape must not fill the memory."""

_thread = threading.local()


class Canvas:
    """Collects the frames of one clip, in RGB or as planes."""

    def __init__(
        self, num_frames: int, config: DecodeConfig, crop: Crop, *, as_planes: bool = False
    ) -> None:
        """A canvas of `num_frames`. as_planes: keep 4:2:0, to be converted later."""
        size = config.height, config.width
        self.config = config
        self._crop = crop
        self._last: Any = None
        self._last_row = 0
        self._matrix, self._is_full = "bt601", False
        self._arrays: tuple[NDArray[np.uint8], ...]
        if as_planes:
            half = (num_frames, 2, size[0] // 2, size[1] // 2)
            self._arrays = np.empty((num_frames, *size), np.uint8), np.empty(half, np.uint8)
        else:
            self._arrays = (np.empty((num_frames, *size, 3), np.uint8),)

    @property
    def pixels(self) -> Tensor | None:
        """uint8 [T, H, W, 3] in RGB, which shares memory with the canvas; None of planes."""
        return torch.from_numpy(self._arrays[0]) if len(self._arrays) == 1 else None

    @property
    def planes(self) -> Planes | None:
        """The clip in 4:2:0, which shares memory with the canvas; None of one in RGB."""
        if len(self._arrays) == 1:
            return None
        y, uv = map(torch.from_numpy, self._arrays)
        return Planes(y, uv, self._matrix, self._is_full)

    def put(self, row: int, frame: Any, aspect: Fraction | None) -> None:
        """Writes `frame` (av.VideoFrame) as frame `row`; `aspect` is width / height of a pixel."""
        if frame is self._last:
            for array in self._arrays:
                array[row] = array[self._last_row]
        else:
            if frame.is_corrupt:
                raise DecodeError(f"its frame at {frame.time} s is damaged")
            turns = round(frame.rotation / 90) % 4
            scaled = self._scaled(frame, turns, aspect)
            raw = scaled if turns % 2 == 0 else scaled[::-1]
            if len(self._arrays) == 1:
                self._put_rgb(row, np.rot90(_scaler().to_rgb(frame, raw), turns), scaled)
            else:
                self._put_planes(row, frame, raw, turns, scaled)
        self._last, self._last_row = frame, row

    def _scaled(self, frame: Any, turns: int, aspect: Fraction | None) -> tuple[int, int]:
        """Rows and columns of the upright picture that covers the canvas."""
        height, width = self.config.height, self.config.width
        source = (frame.height, round(frame.width * (aspect or 1)))
        if turns % 2:
            source = source[::-1]
        scale = max(height / source[0], width / max(1, source[1]))
        rows, columns = max(height, round(source[0] * scale)), max(width, round(source[1] * scale))
        if rows * columns > max(self.config.max_pixels, MAX_SPARE * height * width):
            raise DecodeError(
                f"it is shown as {source[0]} x {source[1]}, and would be {rows} x {columns} pixels "
                f"to cover {height} x {width}"
            )
        return rows, columns

    def _put_rgb(self, row: int, upright: NDArray[np.uint8], scaled: tuple[int, int]) -> None:
        height, width = self.config.height, self.config.width
        top = round((scaled[0] - height) * self._crop[0])
        left = round((scaled[1] - width) * self._crop[1])
        self._arrays[0][row] = upright[top : top + height, left : left + width]

    def _put_planes(
        self, row: int, frame: Any, raw: tuple[int, int], turns: int, scaled: tuple[int, int]
    ) -> None:
        """Crops at even places, so that colours stay with their pixels."""
        self._matrix = _MATRIX_OF_SPACE.get(int(frame.colorspace), "bt601")
        self._is_full = frame.format.name.startswith("yuvj") or int(frame.color_range) == _FULL
        picture = _scaler().to_planes(frame, raw, self._is_full)
        spare = scaled[0] - self.config.height, scaled[1] - self.config.width
        top, left = (round(s // 2 * c) for s, c in zip(spare, self._crop, strict=True))
        y, uv = self._arrays
        targets = ((y[row], 2), (uv[row, 0], 1), (uv[row, 1], 1))
        for (target, unit), plane in zip(targets, picture, strict=True):
            upright = np.rot90(plane, turns)
            height, width = target.shape
            target[...] = upright[
                unit * top : unit * top + height, unit * left : unit * left + width
            ]


_MATRIX_OF_SPACE = {1: "bt709", 9: "bt2020", 10: "bt2020"}
_FULL = 2
"""FFmpeg's AVColorSpace and AVColorRange; all that is not said is BT.601, as its scaler has it."""


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

    def to_planes(
        self, frame: Any, size: tuple[int, int], is_full: bool
    ) -> list[NDArray[np.uint8]]:
        """`frame` in 4:2:0 of `size`: three planes, views of the picture's own memory."""
        name = "yuvj420p" if is_full else "yuv420p"
        picture = frame
        if size != (frame.height, frame.width) or frame.format.name not in (name, "yuv420p"):
            how = self._shrink if size[0] < frame.height else self._enlarge
            picture = self._reformatter.reformat(
                frame, width=size[1], height=size[0], format=name, interpolation=how, threads=1
            )
        half = -(-size[0] // 2), -(-size[1] // 2)
        return [
            np.ndarray(shape, np.uint8, memoryview(plane), strides=(plane.line_size, 1))
            for shape, plane in zip((size, half, half), picture.planes, strict=True)
        ]


def _scaler() -> _Scaler:
    """This thread's scaler."""
    if not hasattr(_thread, "scaler"):
        _thread.scaler = _Scaler()
    scaler: _Scaler = _thread.scaler
    return scaler
