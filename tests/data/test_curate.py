"""Scores of clips whose truth is known, and the copy of a dataset that has them."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.container import DecodeError
from kinodit.data.curate import LIMITS, CurateError, curate
from kinodit.data.killable import Answer, KillableProcess
from kinodit.data.manifest import Dataset
from kinodit.data.media import write_mp4
from kinodit.data.ocr import covered, is_there
from kinodit.data.reader import ShardReader
from kinodit.data.record import Record, RecordError
from kinodit.data.scores import displacement, measure
from kinodit.data.select import open_datasets, plan_spec
from kinodit.data.shots import shot_cuts
from kinodit.data.spec import CostModel
from kinodit.launch.cli import main
from kinodit.models.random import generator
from tests.data.clips import image_bytes, image_record, sound_bytes, sound_record, video_record
from tests.data.clips import write_dataset as write_records
from tests.data.shards import passing

Pixels = npt.NDArray[Any]
FPS, SIDE = 12, 96


def blurred(picture: Pixels, reach: int, axis: int) -> Pixels:
    shifted = [np.roll(picture, shift, axis) for shift in range(-reach, reach + 1)]
    mean: Pixels = np.mean(shifted, axis=0)
    return mean


def texture(seed: int, side: int = 256) -> Pixels:
    """Grey blobs of some pixels: something to follow."""
    noise = generator("texture", seed).normal(size=(side // 8, side // 8))
    smooth = blurred(blurred(np.kron(noise, np.ones((8, 8))), 3, 0), 3, 1)
    low, high = smooth.min(), smooth.max()
    return np.repeat(((smooth - low) / (high - low) * 255)[..., None], 3, -1).astype(np.uint8)


def clip(folder: Path, frames: Pixels, sound: Pixels | None = None) -> Record:
    path = folder / "clip.mp4"
    write_mp4(path, frames, FPS, None if sound is None else (sound, 16_000))
    count = len(frames)
    return video_record(
        "clip", path.read_bytes(), count, float(FPS), width=SIDE, height=SIDE,
        has_audio=sound is not None,
    )  # fmt: skip


def pan(pixels_per_frame: float, count: int = 24, seed: int = 0) -> Pixels:
    wide = texture(seed)
    starts = [round(pixels_per_frame * number) for number in range(count)]
    return np.stack([wide[20 : 20 + SIDE, start : start + SIDE] for start in starts])


@pytest.mark.parametrize("pixels_per_frame", [0.0, 1.0, 2.0, 4.0])
def test_motion_is_the_speed_of_a_pan(tmp_path: Path, pixels_per_frame: float) -> None:
    found = measure(clip(tmp_path, pan(pixels_per_frame)), LIMITS)
    expected = pixels_per_frame * FPS / SIDE
    assert found.scores["motion"] == pytest.approx(expected, rel=0.12, abs=0.004)
    assert found.scores["cuts"] == 0, "a pan is no cut"
    assert "silence" not in found.scores and "ocr" not in found.scores


def test_displacements_are_found_between_pixels_and_not_in_what_is_flat() -> None:
    wide = (texture(3)[..., 0] / 255).astype(np.float32)
    base = wide[:64, 8:72]
    for shift in (0, 1, 3):
        assert displacement(base, wide[:64, 8 - shift : 72 - shift]) == pytest.approx(
            shift, abs=0.1
        )
    halfway = ((wide[:64, 7:71] + wide[:64, 6:70]) / 2).astype(np.float32)
    assert displacement(base, halfway) == pytest.approx(1.5, abs=0.2)
    flat = np.full((64, 64), 0.5, np.float32)
    assert displacement(flat, flat + np.float32(0.001)) == 0


def test_cuts_are_where_shots_begin(tmp_path: Path) -> None:
    shots = [pan(1.0, 10, seed=1), pan(0.0, 14, seed=2), pan(2.0, 12, seed=5)]
    found = measure(clip(tmp_path, np.concatenate(shots)), LIMITS)
    assert found.scores["cuts"] == 2
    assert found.cuts_s == pytest.approx([10 / FPS, 24 / FPS], abs=1e-3)
    # What lies between two shots is no motion of either.
    still, slow, fast = 0.0, FPS / SIDE, 2 * FPS / SIDE
    expected = (10 * slow + 14 * still + 12 * fast) / 36
    assert found.scores["motion"] == pytest.approx(expected, abs=0.02)


def test_a_flash_or_a_fast_pan_is_no_cut() -> None:
    assert shot_cuts([0, *[0.2] * 9]) == []
    assert shot_cuts([0, 0.01, 0.3, 0.3, 0.01, 0.01]) == [], "one frame, and back again"
    assert shot_cuts([0, 0.01, 0.01, 0.3, 0.01, 0.01]) == [3]
    assert shot_cuts([0, 0.3]) == [1]
    assert shot_cuts([]) == []


def test_clarity_falls_with_blur(tmp_path: Path) -> None:
    sharp = np.kron(np.indices((12, 12)).sum(0) % 2 * 255, np.ones((8, 8))).astype(np.uint8)
    soft = blurred(sharp.astype(float), 4, 1)
    scores = []
    for picture in (sharp, soft.astype(np.uint8)):
        frames = np.repeat(np.repeat(picture[None, ..., None], 3, -1), 12, 0)
        scores.append(measure(clip(tmp_path, frames), LIMITS).scores["clarity"])
    assert scores[0] > 5 * scores[1] > 0


@pytest.mark.parametrize("silent_s", [0.0, 0.5, 1.0, 2.0])
def test_silence_is_the_share_that_is_not_heard(tmp_path: Path, silent_s: float) -> None:
    sound = sound_record("tone", sound_bytes(2.0, round(silent_s * 16_000)), 2.0)
    assert measure(sound, LIMITS).scores == {"silence": pytest.approx(silent_s / 2, abs=0.02)}
    times = np.arange(32_000) / 16_000
    track = np.where(times < silent_s, 0, 0.4 * np.sin(2 * np.pi * 500 * times))
    with_sound = clip(tmp_path, pan(0.0), track[None].astype(np.float32))
    assert measure(with_sound, LIMITS).scores["silence"] == pytest.approx(silent_s / 2, abs=0.03)


def test_what_cannot_be_decoded_says_so() -> None:
    with pytest.raises(DecodeError, match="damaged"):
        measure(video_record("x", b"no clip" * 40, 12, 12.0), LIMITS)


def test_boxes_of_text_count_once() -> None:
    box = [[10, 0], [60, 0], [60, 20], [10, 20]]
    assert covered([box, box], 100, 100) == pytest.approx(0.1)
    assert covered([], 100, 100) == 0
    assert covered([[[-5, -5], [200, -5], [200, 200], [-5, 200]]], 10, 10) == 1


@pytest.mark.skipif(not is_there(), reason="needs rapidocr-onnxruntime (extra ocr)")
def test_text_is_found() -> None:
    from PIL import Image, ImageDraw

    from kinodit.data.ocr import TextDetector

    picture = Image.new("RGB", (320, 240), (30, 60, 90))
    detector = TextDetector()
    assert detector.share(np.asarray(picture)) == 0
    ImageDraw.Draw(picture).text((40, 100), "HELLO WORLD", fill=(255, 255, 255), font_size=32)
    assert 0.03 < detector.share(np.asarray(picture)) < 0.2


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A still clip, a moving one, a picture, a sound, and one that is damaged."""
    records = [
        clip(tmp_path, pan(0.0)), clip(tmp_path, pan(4.0)), image_record("p", image_bytes("png")),
        sound_record("tone", sound_bytes(1.0, 8_000), 1.0), video_record("x", b"none" * 99, 9, 9.0),
    ]  # fmt: skip
    named = [Record(f"k{n}", record.meta, record.members) for n, record in enumerate(records)]
    return write_records(tmp_path / "d", named).directory


def test_the_copy_is_filtered_on(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "scored"
    options = ["--workers", "1", "--text", "no", "--decode-limit-s", "60"]
    assert main(["data", "curate", str(dataset), str(copy), *options]) == 0
    captured = capsys.readouterr()
    assert "4 samples with scores, 1 left out" in captured.out
    assert "left out: k4: " in captured.err
    settings = DataConfig(
        datasets={"clips": DatasetConfig(str(copy), filter="motion > 0.1 and scores.cuts == 0")},
        num_frames=4, fps=6.0, samples_per_step=1, packs_per_step=1,
    )  # fmt: skip
    datasets = open_datasets(settings)
    spec = plan_spec(settings, datasets, CostModel(20, 5, 0, 3), seed=3)
    assert spec.datasets[0].eligible is not None and 1 in spec.datasets[0].eligible
    assert spec.datasets[0].num_eligible == 1
    assert passing(datasets["clips"], "scores.silence >= 0.4") == [3]
    before, after = ShardReader(Dataset(dataset)), ShardReader(Dataset(copy))
    for index in range(4):
        old, new = before.read(index), after.read(index)
        assert (old.key, old.members, old.meta.captions) == (
            new.key,
            new.members,
            new.meta.captions,
        )
    assert set(after.read(2).meta.scores) == {"clarity"}


@pytest.mark.parametrize("signal_number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_medium_that_hangs_its_decoder_is_left_out(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_number: int
) -> None:
    """One whose process is killed by somebody else is measured by the next process."""

    class Struck(KillableProcess):
        def ask(self, send: Any, limit_s: float) -> Answer:
            if self.pid is not None and self.num_started == 1:
                os.kill(self.pid, signal_number)
            return super().ask(send, limit_s)

    monkeypatch.setattr("kinodit.data.curate.KillableProcess", Struck)
    monkeypatch.setattr("kinodit.data.killable.GRACE_S", 0.5)
    hasty = replace(LIMITS, decode_limit_s=1.5)
    report = curate(dataset, tmp_path / "scored", workers=1, limits=hasty, name="d")
    reasons = dict(report.left_out)
    expected = {"sample 1", "k4"} if signal_number == signal.SIGSTOP else {"k4"}
    assert set(reasons) == expected and "damaged" in reasons["k4"]
    assert "hung and was killed" in reasons.get("sample 1", "its decoder hung and was killed")
    reader = ShardReader(Dataset(tmp_path / "scored"))
    keys = [reader.read(index).key for index in range(report.manifest.num_samples)]
    assert keys == [key for key in ("k0", "k1", "k2", "k3") if key != "k1" or "k1" in keys]
    assert ("k1" in keys) == (signal_number == signal.SIGKILL)


def test_what_a_process_says_is_not_trusted(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lying(KillableProcess):
        def ask(self, send: Any, limit_s: float) -> Answer:
            facts = {"width": 1 << 40}
            return {"key": "k0", "scores": {"cuts": 1}, "cuts_s": [], "facts": facts}

    monkeypatch.setattr("kinodit.data.curate.KillableProcess", Lying)
    with pytest.raises(RecordError, match="'width'"):
        curate(dataset, tmp_path / "scored", workers=2)


@pytest.mark.slow
def test_processes_write_the_same(dataset: Path, tmp_path: Path) -> None:
    one, two = (
        curate(dataset, tmp_path / f"by{workers}", workers=workers, name="d") for workers in (1, 2)
    )
    assert one == two
    assert one.manifest.num_samples == 4
    with pytest.raises(CurateError, match="0 workers"):
        curate(dataset, tmp_path / "by0", workers=0)
