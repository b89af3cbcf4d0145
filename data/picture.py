"""Decoded frames -> pixels of the recipe's size: scaled to cover it, turned upright, cropped."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
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
        self,
        num_frames: int,
        config: DecodeConfig,
        crop: Crop,
        *,
        as_planes: bool = False,
        into: NDArray[np.uint8] | None = None,
    ) -> None:
        """A canvas of `num_frames`.

        Args:
            num_frames: frames.
            config: their size.
            crop: (row, column) place of the crop, 0 to 1.
            as_planes: keep 4:2:0, to be converted later.
            into: flat memory at whose beginning the pixels are to lie, of planes Y before U and V.
        """
        size = config.height, config.width
        self.config = config
        self._crop = crop
        self._last: Any = None
        self._last_row = 0
        self._scaled_of: tuple[Any, tuple[int, int]] = (None, (0, 0))
        self._matrix, self._is_full = "bt601", False
        self._arrays: tuple[NDArray[np.uint8], ...]
        if as_planes:
            half = (num_frames, 2, size[0] // 2, size[1] // 2)
            self._arrays = _arrays([(num_frames, *size), half], into)
            self._flat = [array.reshape(-1).data for array in self._arrays]
        else:
            self._arrays = _arrays([(num_frames, *size, 3)], into)

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
            # Nearly always as of the frame before: rational arithmetic costs as much as copying it.
            given = frame.height, frame.width, turns, aspect
            if self._scaled_of[0] != given:
                self._scaled_of = given, self._scaled(*given)
            scaled = self._scaled_of[1]
            raw = scaled if turns % 2 == 0 else scaled[::-1]
            if len(self._arrays) == 1:
                self._put_rgb(row, _turned(_scaler().to_rgb(frame, raw), turns), scaled)
            else:
                self._put_planes(row, frame, raw, turns, scaled)
        self._last, self._last_row = frame, row

    def _scaled(
        self, rows: int, columns: int, turns: int, aspect: Fraction | None
    ) -> tuple[int, int]:
        """Rows and columns of the upright picture that covers the canvas."""
        height, width = self.config.height, self.config.width
        source = (rows, round(columns * (aspect or 1)))
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
        name = frame.format.name
        self._matrix = _MATRIX_OF_SPACE.get(int(frame.colorspace), "bt601")
        self._is_full = name.startswith("yuvj") or int(frame.color_range) == _FULL
        planes = _scaler().to_planes(frame, name, raw, self._is_full).planes
        is_whole = not turns and scaled == (self.config.height, self.config.width)
        if is_whole and self._put_whole(row, planes):
            return
        half = -(-raw[0] // 2), -(-raw[1] // 2)
        spare = scaled[0] - self.config.height, scaled[1] - self.config.width
        top, left = (round(s // 2 * c) for s, c in zip(spare, self._crop, strict=True))
        y, uv = self._arrays
        targets = ((y[row], raw, 2), (uv[row, 0], half, 1), (uv[row, 1], half, 1))
        for (target, shape, unit), plane in zip(targets, planes, strict=True):
            upright = _turned(_pixels(plane, shape), turns)
            height, width = target.shape
            target[...] = upright[
                unit * top : unit * top + height, unit * left : unit * left + width
            ]

    def _put_whole(self, row: int, planes: Sequence[Any]) -> bool:
        """Copies planes that are the frame's bytes without a gap; False if they are not."""
        size = self.config.height * self.config.width
        views = [memoryview(plane) for plane in planes]
        if [len(view) for view in views] != [size, size // 4, size // 4]:
            return False
        y, uv = self._flat
        y[row * size : (row + 1) * size] = views[0]
        start, middle, end = (row * size // 2 + part * size // 4 for part in range(3))
        uv[start:middle], uv[middle:end] = views[1:]
        return True


def _arrays(
    shapes: Sequence[tuple[int, ...]], into: NDArray[np.uint8] | None
) -> tuple[NDArray[np.uint8], ...]:
    """New arrays of `shapes`, or such that lie in `into` one after the other."""
    if into is None:
        return tuple(np.empty(shape, np.uint8) for shape in shapes)
    ends = list(accumulate(map(math.prod, shapes)))
    starts = [0, *ends]
    return tuple(
        into[start:end].reshape(shape)
        for start, end, shape in zip(starts, ends, shapes, strict=False)
    )


def _turned(pixels: NDArray[np.uint8], turns: int) -> NDArray[np.uint8]:
    """`pixels`, turned by quarters; nearly none are, and numpy takes long to find out."""
    return np.rot90(pixels, turns) if turns else pixels


def _pixels(plane: Any, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A view of a plane's own memory (av.video.plane.VideoPlane)."""
    inner = (shape[2],) if len(shape) == 3 else ()
    strides = (plane.line_size, *inner, 1)
    return np.ndarray(shape, np.uint8, memoryview(plane), strides=strides)


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
        return _pixels(picture.planes[0], (*size, 3))

    def to_planes(self, frame: Any, name: str, size: tuple[int, int], is_full: bool) -> Any:
        """`frame`, of the pixel format `name`, in 4:2:0 of `size` (av.VideoFrame)."""
        wanted = "yuvj420p" if is_full else "yuv420p"
        if size == (frame.height, frame.width) and name in (wanted, "yuv420p"):
            return frame
        how = self._shrink if size[0] < frame.height else self._enlarge
        return self._reformatter.reformat(
            frame, width=size[1], height=size[0], format=wanted, interpolation=how, threads=1
        )


def _scaler() -> _Scaler:
    """This thread's scaler."""
    scaler: _Scaler | None = _thread.__dict__.get("scaler")
    if scaler is None:
        scaler = _thread.scaler = _Scaler()
    return scaler
