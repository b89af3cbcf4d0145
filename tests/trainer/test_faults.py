"""Faults strike where they are told to, as often as they are told to, and nowhere else."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from kinodit.models.errors import ConfigError
from kinodit.trainer import faults
from kinodit.trainer.config import load_config
from kinodit.trainer.faults import Fault, InjectedFault, arm, parse_faults, reach
from kinodit.trainer.run import train
from kinodit.trainer.topology import Topology
from tests.support.recipes import tiny_recipe, write_dataset


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


def fork(action: Callable[[], None]) -> int:
    """The process id of a copy of this process that does `action` and ends with code 0."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def struck(text: str, rank: int = 0) -> int:
    """A copy of this process that is armed with `text` and begins step 7."""

    def action() -> None:
        arm(parse_faults(text), rank)
        reach("step:begin", 7)

    return fork(action)


def end_of(pid: int) -> int:
    """The exit code of a copy; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_nothing_is_armed_by_default() -> None:
    for point in faults.POINTS:
        reach(point, 0)
    assert not faults._armed


def test_the_environment_is_read_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "raise:step=3")
    reach("step:begin", 3)
    assert faults.arm_from_environment(0) == "raise:step=3"
    with pytest.raises(InjectedFault, match="step:begin of step 3"):
        reach("step:begin", 3)
    monkeypatch.delenv(faults.VARIABLE)
    assert faults.arm_from_environment(0) == ""


def test_text_is_read_as_documented() -> None:
    text = "kill:rank=1,step=7; enospc:point=checkpoint:before-manifest ;sleep:seconds=0.5,times=2"
    assert parse_faults(text) == [
        Fault("kill", rank=1, step=7),
        Fault("enospc", point="checkpoint:before-manifest"),
        Fault("sleep", seconds=0.5, times=2),
    ]
    assert parse_faults("") == [] and parse_faults("nan") == [Fault("nan")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("explode", "action 'explode'"),
        ("kill:point=nowhere", "point 'nowhere'"),
        ("kill:node=3", "key 'node'"),
        ("kill:rank=one", "not a number"),
        ("kill:rank", "not a number"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_faults(text)


def test_only_the_rank_step_and_point_that_were_named() -> None:
    arm([Fault("raise", point="step:end", rank=1, step=4)], rank=1)
    reach("step:end", 3)
    reach("step:begin", 4)
    with pytest.raises(InjectedFault):
        reach("step:end", 4)
    arm([Fault("raise", point="step:end", rank=1, step=4)], rank=0)
    reach("step:end", 4)


def test_as_often_as_it_was_asked_for() -> None:
    arm([Fault("raise", times=2)])
    for _ in range(2):
        with pytest.raises(InjectedFault):
            reach("step:begin", 0)
    reach("step:begin", 0)


def test_not_before_it_was_let_pass() -> None:
    arm([Fault("raise", after=2)])
    reach("step:begin", 0)
    reach("step:begin", 0)
    with pytest.raises(InjectedFault):
        reach("step:begin", 0)


def test_once_is_once_for_all_processes(tmp_path: Path) -> None:
    fault = Fault("raise", once=str(tmp_path / "struck"))
    arm([fault])
    with pytest.raises(InjectedFault):
        reach("step:begin", 0)
    arm([fault])  # as after a restart
    reach("step:begin", 0)


def test_a_full_disk_is_an_os_error() -> None:
    arm([Fault("enospc")])
    with pytest.raises(OSError, match="injected") as caught:
        reach("step:begin", 0)
    assert caught.value.errno == errno.ENOSPC


def test_tensors_are_spoiled_in_place() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for action, changed in (("nan", [True, False]), ("flip", [True, False])):
            tensor = torch.full((2,), 3.0, dtype=dtype)
            arm([Fault(action, point="step:gradients")])
            reach("step:gradients", 0, partial(dict, w=tensor))
            assert (tensor != 3.0).tolist() == changed
        assert tensor[0].item() in (6.0, 1.5)  # flip was last
    spiked = torch.ones(2)
    arm([Fault("spike", point="step:gradients", scale=100)])
    reach("step:gradients", 0, lambda: {"w": spiked})
    assert spiked.tolist() == [100.0, 100.0]


@pytest.mark.parametrize(("action", "number"), [("kill", 9), ("term", 15), ("usr1", 10)])
def test_signals_end_the_process(action: str, number: int) -> None:
    assert end_of(struck(f"{action}:step=7")) == -number


def test_another_rank_is_spared() -> None:
    assert end_of(struck("kill:rank=1")) == 0


def test_stopped_until_continued() -> None:
    pid = struck("stop")
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(pid, signal.SIGCONT)
    assert end_of(pid) == 0


def test_a_hang_holds_every_thread() -> None:
    def action() -> None:
        leave = threading.Timer(0.2, os._exit, (3,))
        leave.start()
        arm([Fault(chosen, seconds=1.0)])
        reach("step:begin", 0)

    chosen = "sleep"
    assert end_of(fork(action)) == 3
    chosen = "hang"
    pid = fork(action)
    time.sleep(0.6)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    assert end_of(pid) == -signal.SIGKILL


def test_a_run_reaches_its_points_and_says_that_it_is_armed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, write_dataset(tmp_path, 3))
    config = load_config(recipe, ["resilience.max_fruitless_restarts=0"])
    stream = io.StringIO()
    alone = Topology(0, 1, 0), torch.device("cpu"), stream
    for point in (point for point in faults.POINTS if point.startswith("step:")):
        monkeypatch.setenv(faults.VARIABLE, f"raise:step=1,point={point}")
        with pytest.raises(InjectedFault, match=f"{point} of step 1"):
            train(config, *alone)
        assert f"faults are armed: raise:step=1,point={point}" in stream.getvalue()
    monkeypatch.setenv(faults.VARIABLE, "nan:step=1,point=step:gradients")
    state = train(
        dataclasses.replace(config, run=dataclasses.replace(config.run, stop_after_steps=2)), *alone
    )
    assert state.step == 2
    rows = (config.run.folder / "metrics.jsonl").read_text()
    assert "NaN" in rows or "nan" in rows or "null" in rows
