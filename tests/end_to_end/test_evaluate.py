"""`kinodit evaluate`: every figure is the same bits on one rank and on two."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from kinodit.data.pack import pack
from kinodit.launch.cli import main
from kinodit.models.encoders.features import ExtractorConfig
from kinodit.trainer.config import load_config
from kinodit.trainer.evaluation.run import EvaluationConfig, evaluate_run
from kinodit.trainer.run import train
from kinodit.trainer.sampling import load_run
from kinodit.trainer.topology import Topology
from tests.support.ranks import Ranks
from tests.support.recipes import SOUND_RATE, tiny_recipe, write_clips

CPU = torch.device("cpu")
MEL = {"name": "mel", "hop": 125, "window": 500, "num_bands": 16, "rounds": 4}
TASKS = {
    "joint": {"streams": {}},
    "sound_of_video": {"streams": {"video": {"use": "clean"}}},
    "first_frame": {"streams": {"video": {"given": "prefix"}}},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    write_clips(root / "clips", 6, with_sound=True)
    pack(root / "clips", root / "data")
    path = tiny_recipe(
        root,
        root / "data",
        eval={"num_samples": 5, "ema": "main"},
        sample={"sampler": {"steps": 2}},
        checkpoint={"every_steps": 2},
        tasks=TASKS,
    )
    document = yaml.safe_load(path.read_text())
    document["model"]["preset"] = "tiny_av"
    document["run"]["steps"] = 2
    document["modalities"]["audio"] = {"codec": MEL, "patch": 2}
    document["data"] |= {"use_audio": True, "audio_rate": SOUND_RATE, "samples_per_step": 6}
    path.write_text(yaml.safe_dump(document))
    config = load_config(path)
    train(config, Topology(0, 1, 0), CPU, io.StringIO())
    return config.run.folder


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.close()


def evaluate(rank: int, world_size: int, run_dir: Path) -> None:
    topology = Topology(rank, world_size, rank)
    wanted = EvaluationConfig(tasks=("all",))
    evaluate_run(run_dir, load_run(run_dir), wanted, topology, CPU)


@pytest.mark.slow
@pytest.mark.gloo
def test_figures_are_the_same_bits_on_any_number_of_ranks(
    run_dir: Path, two: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_dir / "evaluation" / "step-00000002"
    monkeypatch.setattr("kinodit.trainer.evaluation.drawn.NUM_SHOWN", 3)
    evaluate(0, 1, run_dir)
    assert len(list(folder.glob("*.mp4"))) == 3
    one = (folder / "evaluation.json").read_bytes()
    shutil.rmtree(folder)
    two.run(evaluate, run_dir)
    assert (folder / "evaluation.json").read_bytes() == one
    assert len(list(folder.glob("*.mp4"))) == 5 and (folder / "sheet.png").is_file()
    figures = json.loads(one)
    assert figures["num_samples"] == 5
    assert set(figures["loss"]) == set(TASKS)
    assert set(figures["loss"]["joint"]) == {"video", "audio"}
    assert set(figures["loss"]["sound_of_video"]) == {"audio"}, "a condition has no loss"
    levels = load_run(run_dir).objective.validation_levels
    assert set(figures["loss"]["joint"]["audio"]) == {*(f"{t:g}" for t in levels), "mean"}
    for name in ("fid", "kid", "fvd", "fad"):
        assert set(figures[name]) == set(figures[f"{name}_of_halves"]) == {"embedded"}
    by_task = figures["tasks"]
    assert set(by_task) == set(TASKS)
    assert {name: of_task["num_samples"] for name, of_task in by_task.items()} == dict.fromkeys(
        TASKS, 5
    )
    assert "fvd" in by_task["joint"] and "fill" not in by_task["joint"]
    assert "fad" in by_task["sound_of_video"] and "fvd" not in by_task["sound_of_video"]
    fill = by_task["first_frame"]["fill"]
    # The codec is lossless, and the first frame is not touched.
    assert fill["kept_error"] == fill["codec_error"] == 0 < fill["copy_error"]
    for name in ("???.mp4", "???.given.mp4"):
        assert len(list((folder / "tasks" / "first_frame").glob(name))) == 5


def test_the_command_prints_a_table(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run_dir), "--losses-only"]) == 0
    printed = capsys.readouterr().out
    assert "step 2 of" in printed and "loss of audio, sound_of_video" in printed
    assert "FVD" not in printed
    tasks = ["--losses-only", "--tasks", "first_frame"]
    assert main(["evaluate", str(run_dir), "--samples", "2", *tasks]) == 0
    printed = capsys.readouterr().out
    assert "first_frame: error of what is filled in" in printed and "joint: " not in printed
    assert main(["evaluate", str(run_dir), "--tasks", "upscale"]) == 2
    assert "the recipe has first_frame, joint, sound_of_video" in capsys.readouterr().err
    assert main(["evaluate", str(run_dir), "--samples", "1"]) == 2
    assert "--samples 1: must be at least 2" in capsys.readouterr().err
    assert main(["evaluate", str(run_dir), "--step", "7"]) == 2
    assert "it has steps 2" in capsys.readouterr().err


@pytest.mark.slow
def test_pretrained_features_from_folders_are_measured(run_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = transformers.Dinov2Config(**small, image_size=28, patch_size=14)
    hearing = transformers.Wav2Vec2Config(
        **small, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), intermediate_size=16,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Dinov2Model(seeing).save_pretrained(tmp_path / "seeing")
    transformers.Wav2Vec2Model(hearing).save_pretrained(tmp_path / "hearing")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "hearing")
    seen, heard = str(tmp_path / "seeing"), str(tmp_path / "hearing")
    extractors = {
        "dino": ExtractorConfig(kind="picture", path=seen),
        "wav2vec": ExtractorConfig(kind="sound", path=heard),
        "both": ExtractorConfig(kind="synchrony", path=seen, sound_path=heard),
    }
    config = load_run(run_dir)
    config = replace(config, eval=replace(config.eval, extractors=extractors))
    figures = evaluate_run(run_dir, config, EvaluationConfig(), Topology(0, 1, 0), CPU)
    assert set(figures["fid"]) == set(figures["kid"]) == {"embedded", "dino"}
    assert set(figures["fad"]) == {"embedded", "wav2vec"} and set(figures["fvd"]) == {"embedded"}
    assert set(figures["av_synchrony"]) == {"both"}
