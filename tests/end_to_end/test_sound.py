"""Video with sound, and sound alone: trained and sampled by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml

from kinodit.data.media import read_mp4
from kinodit.data.pack import pack
from kinodit.data.sound_file import read_sound
from kinodit.launch.cli import main
from tests.support.recipes import SOUND_RATE, tiny_recipe, write_clips

MEL = {"name": "mel", "hop": 125, "window": 500, "num_bands": 16, "rounds": 4}
AUDIO = {"codec": MEL, "patch": 2}
PROMPT = "a red square moves left"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    write_clips(root / "clips", 6, with_sound=True)
    pack(root / "clips", root / "data")
    return root / "data"


def recipe(root: Path, dataset: Path, preset: str, **data: Any) -> Path:
    path = tiny_recipe(
        root, dataset, eval={"every_steps": 3, "num_samples": 2}, checkpoint={"every_steps": 3}
    )
    document = yaml.safe_load(path.read_text())
    document["model"]["preset"] = preset
    document["modalities"]["audio"] = AUDIO
    document["run"]["steps"] = 3
    document["data"] |= {"use_audio": True, "audio_rate": SOUND_RATE, **data}
    path.write_text(yaml.safe_dump(document))
    return path


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_video_with_sound(tmp_path: Path, dataset: Path) -> None:
    path = recipe(tmp_path, dataset, "tiny_av")
    assert main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "tiny"
    (last,) = rows(run, "validation")
    assert {"loss/video", "loss/audio", "loss_shuffled_captions/audio"} <= set(last)
    bins = rows(run, "train")[0]["noise_bins"]
    counts = {name: sum(count for *_, count in of) for name, of in bins.items()}
    # 4 frames at 8 fps are half a second: 32 latent frames of sound, in tokens of 2; and 2 latent
    # frames of 2 x 2 patches.
    assert counts == {"video": 6 * 8, "audio": 6 * 16}

    assert main(["sample", str(run), "--prompt", PROMPT, "--steps", "2"]) == 0
    folder = run / "samples" / "manual"
    (entry,) = json.loads((folder / "index.json").read_text())
    assert (entry["file"], entry["sound"], entry["rate_hz"]) == ("000.mp4", "000.wav", SOUND_RATE)
    sound, rate = read_sound(folder / "000.wav")
    assert sound.shape == (1, SOUND_RATE // 2) and rate == SOUND_RATE
    assert len(read_mp4(folder / "000.mp4")[0]) == 4
    with av.open(str(folder / "000.mp4")) as container:
        heard = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    # What the mp4 has is the sound of the file beside it, but for AAC.
    size = min(heard.shape[1], sound.shape[1])
    error = np.abs(heard[:, :size] - sound[:, :size]).mean()
    assert error < 0.5 * np.abs(sound).mean() + 1e-3

    picture = ["--prompt", PROMPT, "--num-frames", "2", "--size", "8", "8", "--steps", "1"]
    assert main(["sample", str(run), *picture, "--out", str(tmp_path / "short")]) == 0
    short, _ = read_sound(tmp_path / "short" / "000.wav")
    assert short.shape == (1, SOUND_RATE // 4), "as long as its frames"
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert '"has_sound":true' in page or "controls></video>" in page


def test_sound_alone_of_the_same_videos(tmp_path: Path, dataset: Path) -> None:
    path = recipe(tmp_path, dataset, "tiny_audio", use_video=False)
    assert main(["train", str(path), "sample.sound_format=flac"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert not (run / "codec.json").exists(), "no picture was looked at"
    assert set(rows(run, "train")[0]["noise_bins"]) == {"audio"}
    assert main(["sample", str(run), "--prompt", PROMPT, "--steps", "2"]) == 0
    folder = run / "samples" / "manual"
    (entry,) = json.loads((folder / "index.json").read_text())
    assert (entry["file"], entry["picture"]) == ("000.flac", "000.png")
    assert read_sound(folder / "000.flac")[0].shape == (1, SOUND_RATE // 2)
    assert main(["report", str(run)]) == 0
    assert "data:audio/flac" in (run / "report.html").read_text()


def test_streams_and_what_is_decoded_must_agree(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, dataset, "tiny_av")
    for override, said in (
        ("data.use_audio=false", "data.use_audio=true, or leave 'audio' out"),
        ("data.use_video=false", "data.use_video=true, or leave 'video' out"),
        ("model.preset=tiny", "name 'audio' among them, or set data.use_audio=false"),
        ("modalities.audio.codec.max_hz=5000", "above half of data.audio_rate=8000"),
    ):
        assert main(["train", str(path), override]) == 2
        assert said in capsys.readouterr().err
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
