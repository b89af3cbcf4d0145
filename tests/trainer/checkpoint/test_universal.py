"""To DeepSpeed's universal checkpoints and back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinodit.launch.cli import main
from kinodit.trainer import checkpoint
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.checkpoint import find_checkpoints
from kinodit.trainer.checkpoint.universal import export_universal
from kinodit.trainer.config import load_config
from kinodit.trainer.engine.config import DeepSpeedConfig
from kinodit.trainer.state import CheckpointError
from tests.resume.test_resume import Start, run_case, tensors_of
from tests.support.checkpoints import save
from tests.support.ranks import ROOT, Ranks
from tests.support.recipes import tiny_recipe, write_dataset


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("universal")
    path = tiny_recipe(root, write_dataset(root), run={"steps": 4, "out_dir": str(root / "runs")})
    run_case(0, 1, Start(path, "ours", 2))
    return path


def test_there_and_back_a_run_goes_on_bit_equal(recipe: Path, tmp_path: Path) -> None:
    runs, out = recipe.parent / "runs", tmp_path / "universal"
    assert main(["checkpoint", "export", str(runs / "ours"), str(out)]) == 0
    names = {path.name for path in (out / "zero").iterdir() if path.is_dir()}
    (path,) = checkpoint.find_checkpoints(runs / "ours")
    before = {name: x for name, x in tensors_of(path).items() if not name.startswith("ema/")}
    assert names == {name[6:] for name in before if name.startswith("model/")}
    elsewhere = ["run.name=theirs", "parallel.tp=2"]
    assert main(["checkpoint", "import", str(out), str(recipe), *elsewhere]) == 0
    (path,) = checkpoint.find_checkpoints(runs / "theirs")
    after = tensors_of(path)
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    averages = [name for name in after if name.startswith("ema/main/")]
    assert len(averages) == len(names)
    assert all(np.array_equal(after[x], after[f"model/{x[9:]}"]) for x in averages)
    for name in ("ours", "theirs"):
        run_case(0, 1, Start(recipe, name))
    ours, theirs = (
        tensors_of(checkpoint.find_checkpoints(runs / name)[-1]) for name in ("ours", "theirs")
    )
    assert all(np.array_equal(theirs[name], ours[name]) for name in before)


def test_a_folder_that_exists_and_one_that_is_no_checkpoint_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(recipe.parent / "runs" / "ours")
    assert main(["checkpoint", "export", run, str(tmp_path)]) == 2
    assert "exists: name a new folder" in capsys.readouterr().err
    arguments = ["checkpoint", "import", str(tmp_path), str(recipe), "run.name=other"]
    assert main(arguments) == 2
    assert "tell it by --steps" in capsys.readouterr().err
    assert main([*arguments, "--steps", "3"]) == 2
    assert "no universal checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/tmp/away", "../../away", ""])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    one = torch.ones(2)
    tensors = {f"{prefix}/{name}": one for prefix in ("model", "optim/exp_avg", "optim/exp_avg_sq")}
    save(tmp_path / "run", 1, tensors=tensors)
    with pytest.raises(CheckpointError, match="no name of a folder"):
        export_universal(find_checkpoints(tmp_path / "run")[-1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Trap:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


def test_nothing_but_tensors_is_unpickled(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "zero" / "weight"
    folder.mkdir(parents=True)
    for file in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": Trap()}, folder / f"{file}.pt")
    arguments = ["checkpoint", "import", str(tmp_path), str(recipe), "run.name=trapped"]
    assert main([*arguments, "--steps", "3"]) == 2
    said = capsys.readouterr()
    assert "cannot be read as tensors" in said.err and "it ran" not in said.out


def read_by_deepspeed(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    """What an engine of ours has after DeepSpeed itself has read the folder into it."""
    from tests.trainer.engine.test_zero import engine_of, whole

    small = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))
    engine: Any = engine_of(small, rank, world_size, DeepSpeedConfig(stage=stage))
    engine._engine.optimizer._load_universal_checkpoint(folder, True, False)
    return {name: value.numpy() for name, value in whole(engine.state()).items()}


def trained(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A native engine's state after a step, saved."""
    from kinodit.trainer.certify.trace import NATIVE
    from tests.trainer.engine.test_zero import backward, engine_of, whole

    small = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))
    engine = engine_of(small, rank, world_size, NATIVE)
    backward(engine, small, 0)
    engine.clip(1.0)
    engine.step(1e-3)
    state = whole(engine.state())
    save(Path(folder), 1, tensors=state)
    return {name: value.numpy() for name, value in state.items()}


@pytest.mark.gloo
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"
)
def test_deepspeed_reads_what_was_exported(tmp_path: Path) -> None:
    ranks, out = Ranks(1), tmp_path / "universal"
    try:
        (expected,) = ranks.run(trained, str(tmp_path))
        assert main(["checkpoint", "export", str(tmp_path), str(out)]) == 0
        (found,) = ranks.run(read_by_deepspeed, 3, str(out))
    finally:
        ranks.close()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name
    assert torch.load(out / "zero" / "optimizer_state.pt", weights_only=True)
