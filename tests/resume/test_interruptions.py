"""Interrupted in every step, between steps and between micro-batches: bit for bit the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinodit.data.loader import Loader, StepData
from kinodit.trainer import checkpoint, faults
from kinodit.trainer.faults import Fault, InjectedFault
from tests.resume.test_resume import Start, assert_equal_bits, run_case, tensors_of
from tests.support.recipes import tiny_recipe, write_dataset

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

STEPS = 20
Ledger = dict[int, list[str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interruptions")
    run: dict[str, object] = {"steps": STEPS, "out_dir": str(root / "runs")}
    keep: dict[str, object] = {"every_steps": 1, "keep_last": 2}
    schedule: dict[str, object] = {"name": "cosine", "warmup_steps": 3}
    return tiny_recipe(root, write_dataset(root), run=run, checkpoint=keep, schedule=schedule)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """Sample ids by step, as the loader handed them out last."""
    seen: Ledger = {}
    after = Loader.__next__

    def noted(self: Loader) -> StepData:
        data = after(self)
        seen[data.step] = [sample.ref.sample_id for pack in data.packs for sample in pack]
        return data

    monkeypatch.setattr(Loader, "__next__", noted)
    yield seen
    faults.disarm()


def train(recipe: Path, name: str, threads: int, stop_after: int = 0) -> None:
    overrides = (f"data.num_threads={threads}", f"data.prefetch_steps={threads}")
    run_case(0, 1, Start(recipe, name, stop_after, overrides=overrides))


def run_of(recipe: Path, name: str) -> tuple[Path, list[dict[str, object]]]:
    """The folder, and every row of a step without what depends on the machine."""
    folder = recipe.parent / "runs" / name
    kept = ("step", "loss", "loss/video", "lr", "grad_norm", "tokens", "noise_bins")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return folder, [{key: row[key] for key in kept} for row in rows]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("where", ["between steps", "between micro-batches"])
def test_no_interruption_is_seen_afterwards(
    where: str, threads: int, recipe: Path, ledger: Ledger
) -> None:
    whole, cut = f"whole-{where[8:]}-{threads}", f"cut-{where[8:]}-{threads}"
    train(recipe, whole, threads)
    expected = dict(ledger)
    ledger.clear()
    for step in range(1, STEPS):
        if where == "between steps":
            train(recipe, cut, threads, stop_after=1)
        else:
            # The second forward of a step; the first one's gradients are lost with the process.
            faults.arm([Fault("raise", point="step:micro-batch", step=step, after=1)])
            with pytest.raises(InjectedFault):
                train(recipe, cut, threads)
            faults.disarm()
        found = checkpoint.find_checkpoints(recipe.parent / "runs" / cut)
        assert checkpoint.step_of(found[-1]) == step
    train(recipe, cut, threads)
    (one, rows), (other, other_rows) = run_of(recipe, whole), run_of(recipe, cut)
    assert len(rows) == STEPS and other_rows == rows
    assert ledger == expected and len(ledger) >= STEPS
    ends = [checkpoint.find_checkpoints(folder)[-1] for folder in (one, other)]
    assert checkpoint.load_state(ends[0]) == checkpoint.load_state(ends[1])
    assert_equal_bits(tensors_of(ends[1]), tensors_of(ends[0]))
