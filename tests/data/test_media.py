"""Clips and pictures come back as they were, as the same bytes each time, whole or not at all."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from kinodit.data.media import contact_sheet, gif_bytes, read_mp4, write_mp4, write_png
from kinodit.models.errors import MissingExtraError

Pixels = npt.NDArray[np.uint8]


def clip(num_frames: int = 6, height: int = 48, width: int = 64) -> Pixels:
    """Smooth colour gradients that move: what 4:2:0 keeps."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [128 + 100 * np.sin((x + 3 * t) / 12), 2 * y + 20, 200 - 10 * t + 0 * x]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def test_mp4_round_trip(tmp_path: Path) -> None:
    video = clip()
    write_mp4(tmp_path / "a.mp4", video, fps=7.5)
    back, fps = read_mp4(tmp_path / "a.mp4")
    assert back.shape == video.shape and fps == 7.5
    difference = back.astype(int) - video
    assert np.abs(difference).mean() < 2.0
    # A wrong colour matrix or range would shift whole channels.
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 1.5


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", clip(), fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.colorspace == 1 and context.color_primaries == 1
        assert "creation_time" not in container.metadata
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (33, 31), (1, 1)])
def test_odd_sizes_grow_by_one(tmp_path: Path, height: int, width: int) -> None:
    video = clip(3, height, width)
    write_mp4(tmp_path / "a.mp4", video, fps=8)
    back, _ = read_mp4(tmp_path / "a.mp4")
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(back[:, :height, :width].astype(int) - video).mean() < 4.0


def test_same_pixels_same_bytes(tmp_path: Path) -> None:
    sound = (np.sin(np.arange(8000) / 9, dtype=np.float32)[None], 8000)
    for name in ("a", "b"):
        write_mp4(tmp_path / f"{name}.mp4", torch.from_numpy(clip()), 8.0, sound)
        write_png(tmp_path / f"{name}.png", torch.from_numpy(clip()[0]))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert gif_bytes(tmp_path / "a.mp4") == gif_bytes(tmp_path / "b.mp4")


@pytest.mark.parametrize("channels", [1, 2])
def test_sound(tmp_path: Path, channels: int) -> None:
    rate = 16000
    tone = np.zeros((channels, rate), dtype=np.float32)
    tone[:, rate // 2 :] = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    write_mp4(tmp_path / "a.mp4", clip(8), 8.0, (torch.from_numpy(tone), rate))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.channels == channels and stream.rate == rate
        assert stream.duration is not None and stream.time_base is not None
        assert abs(float(stream.duration * stream.time_base) - 1.0) < 0.15
        back = np.concatenate([f.to_ndarray() for f in container.decode(stream)], axis=1)
    energy = np.abs(back[0]).reshape(-1, 256).mean(axis=1) if back.shape[1] % 256 == 0 else None
    assert energy is not None and abs(back.shape[1] - rate) <= 2048
    onset_s = 256 * int(np.argmax(energy > 0.1)) / rate
    assert abs(onset_s - 0.5) < 0.08


def test_png_is_lossless(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    write_png(tmp_path / "deep" / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "a.png")), image)


def test_gif_has_every_frame_at_the_clip_s_pace(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", clip(5), fps=10)
    (tmp_path / "a.gif").write_bytes(gif_bytes(tmp_path / "a.mp4"))
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (5, 100, 0)  # type: ignore[attr-defined]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_png(path, clip()[0])
    old = path.read_bytes()

    def full(self: Any, file: Path, *rest: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_png(path, clip()[1])
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("library", ["av", "PIL"])
def test_missing_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'kinodit\[media\]'"):
        if library == "av":
            write_mp4(tmp_path / "a.mp4", clip(), 8)
        else:
            write_png(tmp_path / "a.png", clip()[0])
    if library == "PIL":
        with pytest.raises(MissingExtraError):
            contact_sheet([clip()], ["a"])


def test_contact_sheet_shows_frames_in_order_and_captions() -> None:
    videos = [
        np.stack([np.full((32, 48, 3), 25 * t, dtype=np.uint8) for t in range(10)]),
        np.full((1, 200, 100, 3), 255, dtype=np.uint8) * np.array([1, 0, 0], dtype=np.uint8),
    ]
    sheet = contact_sheet(videos, ["grey becomes light", "red " * 60], num_frames=4)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    # The first strip: 32 rows tripled to 96; frames 0, 3, 6, 9 side by side, 4 pixels apart.
    rows = [r for r in range(len(sheet)) if (sheet[r, 16 : 16 + 144] == 0).all()]
    assert len(rows) == 96
    line = sheet[rows[10], 16:, 0]
    assert [int(line[column * 148 + 70]) for column in range(4)] == [0, 75, 150, 225]
    red = (sheet == np.array([255, 0, 0])).all(axis=2)
    assert red.any(axis=1).sum() == 96 and red.any(axis=0).sum() == 48
    # Both captions are there, above their strips, and the long one is wrapped.
    dark = (sheet.max(axis=2) < 120).any(axis=1)
    assert dark[: rows[0] - 2].any()
    between = dark[rows[-1] + 1 : int(np.argmax(red.any(axis=1)))]
    assert between.sum() > 20


def test_contact_sheet_is_deterministic() -> None:
    assert np.array_equal(contact_sheet([clip()], ["a"]), contact_sheet([clip()], ["a"]))
