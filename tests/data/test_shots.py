"""Shot cuts of clips whose cuts are known, by each way to find them that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from kinodit.data import shots
from kinodit.data.curate import LIMITS, curate
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardReader
from kinodit.data.scores import measure
from kinodit.data.shots import ShotError, Shots, is_there, shot_finder
from kinodit.launch.cli import main
from kinodit.models.errors import MissingExtraError
from tests.data.clips import write_dataset
from tests.data.test_curate import FPS, SIDE, Pixels, clip, pan

OTHERS: tuple[Shots, ...] = ("pyscenedetect", "transnetv2")


def require(way: Shots) -> None:
    if not is_there(way):
        pytest.skip(f"needs the packages of {way} (extra shots)")


def photograph(name: str, count: int) -> Pixels:
    """A pan over a real picture, [count, SIDE, SIDE, 3]."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image (extra demo)")
    picture = getattr(data, name)()
    return np.stack([picture[60 : 60 + SIDE, n : n + SIDE] for n in range(count)])


def cuts_of(folder: Path, frames: Pixels, way: Shots) -> list[int]:
    found = measure(clip(folder, frames), LIMITS, shots=way)
    assert found.scores["cuts"] == len(found.cuts_s)
    return [round(time_s * FPS) for time_s in found.cuts_s]


@pytest.mark.parametrize("way", get_args(Shots))
def test_hard_cuts_are_told_to_the_frame(tmp_path: Path, way: Shots) -> None:
    require(way)
    names = ("astronaut", "coffee", "chelsea")
    parts = [photograph(name, count) for name, count in zip(names, (20, 31, 25), strict=True)]
    assert cuts_of(tmp_path, np.concatenate(parts), way) == [20, 51]
    assert cuts_of(tmp_path, parts[1], way) == []


def test_a_dissolve_is_a_cut_for_the_network_alone(tmp_path: Path) -> None:
    one, other = photograph("astronaut", 40), photograph("coffee", 40)
    share = np.linspace(0, 1, 12)[1:-1, None, None, None]
    mixed = (one[30:] * (1 - share) + other[:10] * share).astype(np.uint8)
    frames = np.concatenate([one[:30], mixed, other[10:]])
    assert cuts_of(tmp_path, frames, "own") == []
    require("transnetv2")
    (found,) = cuts_of(tmp_path, frames, "transnetv2")
    assert 30 <= found <= 41


def test_a_change_of_colour_is_a_cut_where_colour_is_looked_at(tmp_path: Path) -> None:
    frames = pan(0.0, 24)
    red = np.array([1.0, 0.25, 0.25])
    frames = np.concatenate([frames[:12] * red, frames[12:] * red[::-1]]).astype(np.uint8)
    require("pyscenedetect")
    assert cuts_of(tmp_path, frames, "pyscenedetect") == [12]


def test_determinism_is_as_it_was() -> None:
    require("transnetv2")
    shots._transnet.cache_clear()
    before = torch.are_deterministic_algorithms_enabled()
    shots._transnet()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_way_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shots, "find_spec", lambda package: None)
    for way in OTHERS:
        with pytest.raises(MissingExtraError, match=r"kinodit\[shots\]"):
            shot_finder(way)
    assert shot_finder("own").cuts() == []
    with pytest.raises(ShotError, match="'eye'"):
        shot_finder("eye")  # type: ignore[arg-type]
    folder = write_dataset(tmp_path / "d", [clip(tmp_path, pan(0.0))]).directory
    command = ["data", "curate", str(folder), str(tmp_path / "scored"), "--shots", "transnetv2"]
    assert main(command) == 2
    assert "kinodit[shots]" in capsys.readouterr().err
    assert not (tmp_path / "scored").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_processes_find_them_too(tmp_path: Path, way: Shots) -> None:
    require(way)
    frames = np.concatenate([photograph("astronaut", 20), photograph("coffee", 20)])
    folder = write_dataset(tmp_path / "d", [clip(tmp_path, frames)]).directory
    curate(folder, tmp_path / "scored", shots=way, workers=1)
    meta = ShardReader(Dataset(tmp_path / "scored")).read(0).meta
    assert meta.scores["cuts"] == 1 and meta.extra["cuts_s"] == f"{20 / FPS:.3f}"
