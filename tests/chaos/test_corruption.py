"""A flipped bit in one copy of a weight is found in time, named, and never saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinodit.trainer import checkpoint
from kinodit.trainer.resilience.errors import CorruptedError
from tests.support.evidence import write_evidence
from tests.support.lives import Lives, Start

pytestmark = [pytest.mark.chaos, pytest.mark.gloo, pytest.mark.timeout(3600)]

EVERY = 3
SECTIONS: dict[str, dict[str, object]] = {
    "run": {"steps": 12},
    "parallel": {"dp_replicate": 3},
    "resilience": {"checksum_every_steps": EVERY},
}


@pytest.mark.parametrize("rank", [0, 2])
def test_names_the_odd_one_of_three_and_goes_on_without_it(
    rank: int, recipe: Path, lives: Lives
) -> None:
    name = f"flip{rank}"
    overrides = (f"run.name={name}", "checkpoint.every_steps=5")
    fault = f"flip:point=step:end,rank={rank},step=6,once={recipe.parent / name}.once"
    start = Start(recipe, overrides, fault, world_size=3)
    end = lives.run(start)
    assert end.codes == [CorruptedError.exit_code] * 3, end.logs
    for log in end.logs:
        # Flipped after the update of step 6; compared after steps 3, 6, 9 and so on.
        assert "after step 9 the copies of " in log
        assert "differ, first model/" in log
        assert f"rank {rank} of 3 is the odd one" in log
    run = recipe.parent / name
    assert [checkpoint.step_of(path) for path in checkpoint.find_checkpoints(run)] == [5]
    assert lives.run(start).codes == [0, 0, 0]


def test_compares_before_every_save(recipe: Path, lives: Lives) -> None:
    overrides = ("run.name=save", "checkpoint.every_steps=2", "resilience.checksum_every_steps=100")
    end = lives.run(Start(recipe, overrides, "flip:point=step:end,rank=1,step=5", world_size=3))
    assert end.codes == [CorruptedError.exit_code] * 3, end.logs
    found = checkpoint.find_checkpoints(recipe.parent / "save")
    assert [checkpoint.step_of(path) for path in found] == [2, 4]


@pytest.mark.parametrize("axes", ["dp_replicate=2 dp_shard=2", "dp_replicate=2 tp=2", "cp=2"])
def test_no_false_alarm(axes: str, recipe: Path, lives: Lives, size: str) -> None:
    steps = 1000 if size == "full" else 20
    name = f"quiet{axes.count('2')}{axes[-4]}"
    layout = [f"parallel.{axis}" for axis in ("dp_replicate=1 " + axes).split()]
    overrides = (
        f"run.name={name}",
        f"run.steps={steps}",
        "resilience.checksum_every_steps=1",
        "log.every_steps=100",
        *layout,
    )
    world_size = 4 if axes.count("2") == 2 else 2
    end = lives.run(Start(recipe, overrides, world_size=world_size, wall_s=1500.0))
    assert end.codes == [0] * world_size, end.logs
    if size == "full":
        figures = {
            "command": "pytest -m chaos --size full tests/chaos/test_corruption.py",
            "layout": axes,
            "steps": steps,
            "checks": steps,
            "alarms": 0,
        }
        write_evidence(f"checksum_{name}", "tests/chaos/test_corruption.py", figures)
