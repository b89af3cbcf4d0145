"""How much of a picture is text: PP-OCRv4's detector, where it is installed (extra `ocr`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.models.errors import MissingExtraError

Pixels = NDArray[np.uint8]


def is_there() -> bool:
    """Whether the detector is installed."""
    return find_spec("rapidocr_onnxruntime") is not None


class TextDetector:
    """Finds text in pictures. For one process.

    Raises MissingExtraError if the detector is not installed.
    """

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise MissingExtraError("rapidocr-onnxruntime", "ocr", "finding text") from error
        self._find: Any = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def share(self, picture: Pixels) -> float:
        """Share of the area of a picture, uint8 [H, W, 3] in RGB, that boxes of text take up."""
        boxes, _ = self._find(
            np.ascontiguousarray(picture[:, :, ::-1]), use_cls=False, use_rec=False
        )
        return covered([] if boxes is None else boxes, picture.shape[0], picture.shape[1])


def covered(boxes: Sequence[Any], height: int, width: int) -> float:
    """Share of `height` x `width` pixels that are in one of the boxes: four (x, y) corners each."""
    mask = np.zeros((height, width), np.bool_)
    for box in boxes:
        corners = np.asarray(box, np.float64)
        left, top = np.floor(corners.min(axis=0)).astype(int)
        right, bottom = np.ceil(corners.max(axis=0)).astype(int)
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return float(mask.mean())
