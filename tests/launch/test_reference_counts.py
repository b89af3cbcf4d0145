"""What is planned of reference pictures is what packs really hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kinodit.data.encode import SampleEncoder
from kinodit.data.loader import Loader
from kinodit.data.media import write_png
from kinodit.data.pack import pack
from kinodit.data.select import open_datasets, plan_spec
from kinodit.launch.cli import main
from kinodit.launch.data_order import data_order, reference_counts
from kinodit.launch.plan.workload import Given, read_workload
from kinodit.trainer.batches import BatchSource, pack_spec
from kinodit.trainer.config import RunConfig, load_config
from kinodit.trainer.encoders import cost_model, fitted_encoders
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.setup import task_mix
from tests.support.recipes import tiny_recipe

NUM_STEPS, PICTURE_TOKENS = 6, 4
TASKS: dict[str, object] = {
    "edit": {"weight": 2, "streams": {"video": {"references": "clean", "dropout": 0.4}}},
    "group": {"streams": {"video": {"references": "target"}}},
    "picture": {},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 9 pictures one brings three reference pictures along, two bring one, the others none."""
    root = tmp_path_factory.mktemp("references")
    (root / "edits").mkdir()
    for number in range(9):
        names = [f"e{number}.png"]
        names += [f"e{number}.ref{n}.png" for n in range({0: 3, 1: 1, 2: 1}.get(number, 0))]
        for place, name in enumerate(names):
            picture = np.full((16, 16, 3), 20 * number + place, np.uint8)
            write_png(root / "edits" / name, torch.tensor(picture))
        (root / "edits" / f"e{number}.txt").write_text("make it blue")
    pack(root / "edits", root / "data")
    return tiny_recipe(
        root,
        root / "data",
        modalities={
            "video": {
                "codec": {"name": "wavelet", "temporal_levels": 0, "spatial_levels": 2},
                "patch": [1, 2, 2],
            },
        },
        data={"num_frames": 1, "fps": 1, "max_references": 3},
        tasks=TASKS,
    )


def held(config: RunConfig, folder: Path) -> list[int]:
    """Tokens of pictures in each pack of the first steps, as training packs them."""
    datasets, mesh = open_datasets(config.data), Mesh(torch.device("cpu"))
    encoders = fitted_encoders(config, folder, datasets, mesh)
    spec = plan_spec(config.data, datasets, cost_model(config, encoders), config.run.seed)
    encoder = SampleEncoder(encoders, config.run.seed, 0.0)
    streams = pack_spec(list(config.model.streams), encoders, config.modalities.video.patch)
    mix = task_mix(config, encoder, config.run.seed)
    source = BatchSource(encoder, streams, 0, torch.float32, mix)
    loader = Loader(spec, datasets, config.data, 0, 1, start_step=0)
    try:
        steps = iter(loader)
        batches = [one for _ in range(NUM_STEPS) for one in source.batches(next(steps))]
    finally:
        loader.close()
    return [batch.modalities["video"].num_tokens for batch in batches]


def test_counts_are_those_of_real_packs(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    counts = reference_counts(config, data_order(config), NUM_STEPS)
    assert counts is not None
    tokens = held(config, tmp_path)
    samples = config.data.samples_per_step * NUM_STEPS
    assert counts.num_samples == samples and counts.num_steps == NUM_STEPS
    assert 0 < counts.pictures < 3 * counts.with_some < 3 * samples
    assert sum(tokens) == PICTURE_TOKENS * (samples + counts.pictures)
    segments = samples // len(tokens)
    assert max(tokens) == PICTURE_TOKENS * (segments + counts.most)

    planned = read_workload(config, Given(pictures=counts.most))
    assert planned.pack_tokens["video"] == max(tokens)
    reserved = read_workload(config, Given())
    assert reserved.pack_tokens["video"] == PICTURE_TOKENS * segments * 4
    assert any("the most that it can have" in note for note in reserved.notes)


def test_both_commands_say_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(recipe)
    counts = reference_counts(config, data_order(config), 16)
    assert counts is not None
    cluster = ["--gpus", "1", "--gpu-memory", "80"]
    assert main(["plan", str(recipe), *cluster]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{counts.with_some} bring reference pictures along, of which {counts.pictures}" in said
    assert main(["plan", str(recipe), "data.datasets.clips.path=/nowhere", *cluster]) == 0
    assert "the datasets are not on this machine" in " ".join(capsys.readouterr().out.split())

    assert main(["data", "plan", str(recipe), "--steps", "16"]) == 0
    line = f"{counts.pictures / 16:.1f} take part, at most {counts.most} in a pack"
    assert line in capsys.readouterr().out
    assert main(["data", "plan", str(recipe), "--steps", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["references"]["most"] == counts.most


def test_nothing_is_counted_where_no_pictures_are_taken(recipe: Path) -> None:
    keys = ["data.max_references=0", *(f"tasks.{n}.streams.video.references=absent" for n in TASKS)]
    config = load_config(recipe, keys)
    assert reference_counts(config, data_order(config), 1) is None
    tasks = [*(f"tasks.{name}.streams.video.references=absent" for name in TASKS)]
    unused = load_config(recipe, tasks)
    found = reference_counts(unused, data_order(unused), NUM_STEPS)
    assert found is not None and found.with_some > 0 == found.pictures
