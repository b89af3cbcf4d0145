"""Raw, from a cache, or some of each: one loss curve, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.data.pack import pack
from kinodit.launch.cli import main
from tests.support.recipes import tiny_recipe, write_clips, write_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cache")
    write_dataset(made)
    write_clips(made / "more", 5)
    pack(made / "more", made / "other", shard_bytes=1 << 20)
    return made


def recipe_of(root: Path) -> Path:
    return tiny_recipe(
        root,
        root / "data",
        data={
            "datasets": {
                "clips": {"path": str(root / "data")},
                "more": {"path": str(root / "other"), "weight": 0.5},
            }
        },
        run={"steps": 4},
        eval={"every_steps": 2, "num_samples": 5},
    )


def losses(root: Path, name: str, *overrides: str) -> list[tuple[int, float, float]]:
    """(step, loss, norm of the gradients) of a run."""
    words = ["train", str(recipe_of(root)), f"run.name={name}", *overrides]
    assert main(words) == 0
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    trained = [row for row in rows if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in trained]


def encode(root: Path, name: str, folder: str, *words: str) -> Path:
    arguments = ["data", "encode", str(recipe_of(root)), str(root / folder), "--dataset", name]
    assert main([*arguments[:4], *words, *arguments[4:]]) == 0
    return root / folder


def test_training_is_the_same_from_raw_from_a_cache_and_mixed(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = "data.window=first"
    encode(root, "clips", "c", fixed, "--part", "0/2")
    encode(root, "clips", "c", fixed, "--part", "1/2")
    assert "complete" in capsys.readouterr().out
    encode(root, "more", "m", fixed)
    first, other = (
        f"data.datasets.clips.cache={root / 'c'}",
        f"data.datasets.more.cache={root / 'm'}",
    )
    raw = losses(root, "raw", fixed)
    assert losses(root, "mixed", fixed, first) == raw
    # Windows that a step draws elsewhere are decoded as ever.
    drawn = f"data.datasets.clips.cache={encode(root, 'clips', 'drawn')}"
    assert losses(root, "drawn-cached", drawn) == losses(root, "drawn")
    decoded: list[str] = []
    monkeypatch.setattr(
        "kinodit.data.decoders.decode", lambda record, *_: decoded.append(record.key)
    )
    # Nothing is decoded any more but for the codec's statistics, which a run keeps.
    kept = root / "runs" / "raw" / "codec.json"
    (root / "runs" / "cached").mkdir(parents=True)
    (root / "runs" / "cached" / "codec.json").write_bytes(kept.read_bytes())
    here = "data.workers=threads"
    assert losses(root, "cached", fixed, here, first, other) == raw
    assert decoded == []


def test_a_stale_cache_is_refused_before_the_first_step(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = encode(root, "more", "m2")
    recipe = str(recipe_of(root))
    stale = f"data.datasets.more.cache={cache}"
    codec = "modalities.video.codec.temporal_levels=2"
    assert main(["train", recipe, "run.name=stale", stale, codec]) == 2
    error = capsys.readouterr().err
    assert "is stale: encoder of stream video is" in error and "it was made with" in error
    assert not (root / "runs" / "stale" / "metrics.jsonl").exists()
    wrong = f"data.datasets.clips.cache={cache}"
    assert main(["train", recipe, "run.name=wrong", wrong]) == 2
    assert "is stale: the dataset has content" in capsys.readouterr().err


def test_a_dataset_has_to_be_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "encode", str(recipe_of(root)), str(root / "x")]) == 2
    assert "the recipe has clips, more; name one" in capsys.readouterr().err
