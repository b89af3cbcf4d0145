"""Verdicts about steps, and where a run goes back to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kinodit.models.errors import ConfigError
from kinodit.trainer import checkpoint
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.resilience.config import GuardConfig, ResilienceConfig
from kinodit.trainer.resilience.errors import DivergedError
from kinodit.trainer.resilience.guard import Guard
from kinodit.trainer.resilience.rollback import (
    SET_ASIDE,
    RollBack,
    check_finite,
    past_bad_data,
    roll_back,
)
from kinodit.trainer.resilience.signals import Signals
from kinodit.trainer.state import CheckpointError, GuardState, TrainState

ALONE = Mesh(torch.device("cpu"))
CONFIG = GuardConfig(spike_factor=10.0, window_steps=4, max_skips=2)


def judge(guard: Guard, step: int, loss: float, norm: float) -> bool:
    return guard.gate(step)(torch.tensor([loss / 2, loss / 2]), torch.tensor(norm))


def new_guard(state: GuardState | None = None, config: GuardConfig = CONFIG) -> Guard:
    return Guard(config, ALONE, Signals(), state or GuardState())


@pytest.mark.parametrize(
    ("loss", "norm", "says"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.nan, "the gradient norm is nan"),
        (1.0, -math.inf, "the gradient norm is -inf"),
        (30.0, 1.0, "the loss is 30, 10"),
        (1.0, 100.0, "the gradient norm is 100, 50"),
    ],
)
def test_refuses_what_is_not_finite_or_spikes(loss: float, norm: float, says: str) -> None:
    guard = new_guard()
    for step, usual in enumerate([3.0, 2.8, 3.1, 2.9]):
        assert judge(guard, step, usual, 2.0)
    before = guard.state
    assert not judge(guard, 4, loss, norm)
    assert guard.reason.startswith(says)
    assert guard.state == GuardState(before.recent, (4,), 1)
    assert judge(guard, 5, 3.0, 2.0)
    assert not guard.reason


def test_no_spike_before_the_window_is_full_nor_where_it_is_off() -> None:
    guard = new_guard()
    for step, norm in enumerate([1.0, 50.0, 1.0, 50.0]):
        assert judge(guard, step, 1.0, norm)
    off = new_guard(config=GuardConfig(spike_factor=0.0, window_steps=1))
    assert all(judge(off, step, 1.0, 1000.0**step) for step in range(4))


def test_a_resumed_guard_comes_to_the_same_verdicts() -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 20.0, 1.2, 11.5, 9.0, 1.0, 30.0]
    whole = new_guard()
    verdicts = [judge(whole, step, loss, 1.0) for step, loss in enumerate(losses)]
    assert verdicts.count(False) == 3
    for cut in range(1, len(losses)):
        first = new_guard()
        ours = [judge(first, step, losses[step], 1.0) for step in range(cut)]
        text = TrainState(cut, 0, 0, "plan", 0, first.state).to_json()
        resumed = new_guard(TrainState.from_json(text, "here").guard)
        ours += [judge(resumed, step, losses[step], 1.0) for step in range(cut, len(losses))]
        assert ours == verdicts
        assert resumed.state == whole.state


def test_goes_back_after_too_many_refusals_in_a_window() -> None:
    guard = new_guard()
    state = TrainState(0, 0, 0, "plan", 100)
    assert not judge(guard, 0, math.nan, 1.0)
    guard.check(state)
    for step in (1, 2, 3):
        judge(guard, step, 1.0, 1.0)
    # Step 0 has left the window of four by now.
    assert not judge(guard, 4, math.nan, 1.0)
    guard.check(state)
    assert not judge(guard, 6, 1.0, math.inf)
    with pytest.raises(RollBack, match="2 of the steps 4 to 6") as raised:
        guard.check(TrainState(7, 0, 0, "plan", 100))
    assert (raised.value.good_step, raised.value.data_step) == (4, 107)


def test_updates_are_the_steps_that_were_not_refused() -> None:
    state = TrainState(10, 0, 0, "plan", 5, GuardState(num_skipped=3))
    assert (state.num_updates, state.data_step) == (7, 15)


def test_states_of_before_are_read_and_damaged_ones_named() -> None:
    old = {"format": 1, "step": 3, "num_samples": 1, "num_tokens": 2, "plan": "p"}
    assert TrainState.from_json(json.dumps(old), "x") == TrainState(3, 1, 2, "p")
    with pytest.raises(CheckpointError, match="damaged"):
        TrainState.from_json(json.dumps({**old, "guard": {"recent": [1]}}), "x")


def checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / checkpoint.MANIFEST_FILE).write_text("{}")


def test_later_checkpoints_are_set_aside_and_the_data_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint,
        "find_checkpoints",
        lambda run: sorted((run / "checkpoints").glob("step-*")),
    )
    checkpoints(tmp_path, 10, 20, 30)
    said = roll_back(tmp_path, RollBack(25, 33, "why"), max_rollbacks=2)
    assert said == "why: back to step 20, with the data from plan step 33 on (1 of 2)"
    assert [path.name[-2:] for path in checkpoint.find_checkpoints(tmp_path)] == ["10", "20"]
    assert len(list((tmp_path / "checkpoints" / SET_ASIDE).iterdir())) == 1
    assert past_bad_data(tmp_path, TrainState(20, 0, 0, "p")).data_step == 33
    assert past_bad_data(tmp_path, TrainState(10, 0, 0, "p")).data_step == 10
    # A later life of the same step that has passed over more already keeps its own.
    assert past_bad_data(tmp_path, TrainState(20, 0, 0, "p", 50)).data_step == 70
    roll_back(tmp_path, RollBack(25, 40, "again"), max_rollbacks=2)
    assert past_bad_data(tmp_path, TrainState(20, 0, 0, "p")).data_step == 40
    with pytest.raises(DivergedError, match=r"2 times already.*Lower optim\.lr"):
        roll_back(tmp_path, RollBack(25, 45, "again"), max_rollbacks=2)


def test_without_a_checkpoint_the_run_starts_anew(tmp_path: Path) -> None:
    tmp_path.joinpath("checkpoints").mkdir()
    assert "back to step 0" in roll_back(tmp_path, RollBack(3, 6, "why"), max_rollbacks=1)
    assert past_bad_data(tmp_path, TrainState(0, 0, 0, "p")).data_step == 6


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(poison: float) -> None:
    tensors = {"a": torch.ones(3), "empty": torch.empty(0), "b": torch.ones(2, 2)}
    state = TrainState(8, 0, 0, "plan", 2)
    check_finite(tensors, state, ALONE)
    tensors["b"][1, 0] = poison
    with pytest.raises(RollBack, match="not finite") as raised:
        check_finite(tensors, state, ALONE)
    assert (raised.value.good_step, raised.value.data_step) == (7, 10)


@pytest.mark.parametrize(
    "fields",
    [{"spike_factor": 0.5}, {"window_steps": 0}, {"max_skips": 0}, {"max_rollbacks": -1}],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        GuardConfig(**fields)


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(ConfigError, match="save_margin_s"):
        ResilienceConfig(save_margin_s=-1.0)
