"""Images are one-frame videos: they train beside clips, and are sampled as pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from kinodit.data.pack import pack
from kinodit.launch.cli import main
from kinodit.models.random import generator
from tests.support.recipes import tiny_recipe, write_clips

NUM_CLIPS, NUM_STILLS = 3, 4
CODEC = {"name": "wavelet", "temporal_levels": 1, "spatial_levels": 2, "first_frame_alone": True}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_clips(tmp_path / "media", NUM_CLIPS)
    for number in range(NUM_STILLS):
        source = generator("still", number)
        pixels = source.integers(0, 256, size=(20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "media" / f"still{number}.png")
        (tmp_path / "media" / f"still{number}.txt").write_text(f"picture {number}")
    pack(tmp_path / "media", tmp_path / "data")
    return tmp_path / "data"


def test_stills_and_clips_train_together(tmp_path: Path, dataset: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        dataset,
        run={"steps": 2},
        objective={"condition_dropout": 0.0},
        modalities={"video": {"codec": CODEC, "patch": [1, 2, 2]}},
        data={"num_frames": 5, "samples_per_step": NUM_CLIPS + NUM_STILLS, "packs_per_step": 2},
    )
    assert main(["train", str(recipe)]) == 0
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    captions = [path.read_text() for path in (tmp_path / "media").glob("*.txt")]
    text = sum(1 + len(caption) for caption in captions)
    # 16 pixels are 4 latent cells and 2 patches a side; 5 frames are a first one and 2 pairs.
    assert [row["tokens"] for row in rows] == [text + NUM_CLIPS * 3 * 4 + NUM_STILLS * 4] * 2
    with_loss = sum(count for _, _, _, count in rows[0]["noise_bins"]["video"])
    assert with_loss == NUM_CLIPS * 3 * 4 + NUM_STILLS * 4

    assert main(["sample", str(run), "--prompt", "picture 1", "--num-frames", "1"]) == 0
    with Image.open(run / "samples" / "manual" / "000.png") as picture:
        assert picture.size == (16, 16)
    out = str(tmp_path / "wide")
    wide = ["--prompt", "a red square moves left", "--size", "8", "32", "--steps", "2"]
    assert main(["sample", str(run), "--out", out, *wide]) == 0
    assert json.loads((tmp_path / "wide" / "index.json").read_text())


def test_a_codec_without_stills_says_so_at_the_start(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_recipe(tmp_path, dataset))]) == 2
    message = capsys.readouterr().err
    assert "4 of its 7 samples are still images" in message
    assert "first_frame_alone" in message and "modality=video" in message


STREAMS = {"image": {"in_channels": 1}}


@pytest.mark.slow
def test_stills_may_have_a_stream_of_their_own(tmp_path: Path, dataset: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        dataset,
        run={"steps": 2},
        objective={"condition_dropout": 0.0},
        modalities={"video": {"codec": CODEC, "patch": [1, 2, 2]}},
        model={"streams": STREAMS},
        data={
            "num_frames": 5,
            "samples_per_step": NUM_CLIPS + NUM_STILLS,
            "packs_per_step": 2,
            "sizes": "own",
            "height": 24,
            "width": 24,
        },
        tasks={"all": {}, "clips_alone": {"streams": {"image": {"use": "absent"}}}},
    )
    assert main(["train", str(recipe)]) == 0
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert len(trained) == 2
    for row in trained:
        assert row["loss/image"] > 0 and row["loss/video"] > 0
        counts = {name: sum(count for *_, count in row["noise_bins"][name]) for name in STREAMS}
        # 20 x 24 pixels, in tokens of 8 x 8.
        assert counts["image"] == NUM_STILLS * 2 * 3

    prompt = ["--prompt", "picture 1", "--steps", "2", "--task", "all"]
    assert main(["sample", str(run), *prompt, "--num-frames", "1"]) == 0
    with Image.open(run / "samples" / "manual" / "000.png") as picture:
        assert picture.size == (24, 24)
    assert main(["sample", str(run), *prompt]) == 0
    (entry,) = json.loads((run / "samples" / "manual" / "index.json").read_text())
    assert entry["num_frames"] == 5


@pytest.mark.parametrize(
    ("streams", "patch", "message"),
    [
        (
            {"image": {"in_channels": 1}},
            [2, 2, 2],
            "joins latent frames, of which an image has one",
        ),
        (None, [1, 2, 2], "an image alone being a clip of one frame"),
    ],
)
def test_a_stream_of_stills_that_cannot_be_is_refused(
    streams: dict[str, object] | None,
    patch: list[int],
    message: str,
    tmp_path: Path,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(tmp_path, dataset, modalities={"video": {"codec": CODEC, "patch": patch}})
    whole = yaml.safe_load(recipe.read_text())
    if streams is None:
        # Without a preset the streams are those that are named.
        streams = {"text": {"in_channels": 1, "output": False}, "image": {"in_channels": 1}}
        del whole["model"]["preset"]
        whole["data"]["use_video"] = True
    whole["model"]["streams"] = streams
    recipe.write_text(yaml.safe_dump(whole))
    assert main(["train", str(recipe)]) == 2
    assert message in capsys.readouterr().err
