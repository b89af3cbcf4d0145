"""Wishes to stop: which one wins, and when the time of a job is up."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kinodit.launch.topology import read_job
from kinodit.trainer.resilience.signals import (
    FINISHED_FILE,
    Request,
    Signals,
    is_finished,
    requeue_marker,
    write_marker,
)


def wanted(signals: Signals) -> Request:
    return signals.request


def test_usr1_asks_to_come_back_and_term_wins_over_it() -> None:
    with Signals() as signals:
        assert wanted(signals) is Request.NONE
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wanted(signals) is Request.REQUEUE
        os.kill(os.getpid(), signal.SIGTERM)
        assert wanted(signals) is Request.STOP
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wanted(signals) is Request.STOP


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("left_s", "margin_s", "save_at_s"),
    [(1000.0, 120.0, 880.0), (100.0, 120.0, 75.0), (1000.0, 0.0, None), (-5.0, 60.0, -5.0)],
)
def test_saves_before_the_job_ends(left_s: float, margin_s: float, save_at_s: float | None) -> None:
    now_s = 50.0
    signals = Signals(now_s + left_s, margin_s, clock=lambda: now_s)
    if save_at_s is None:
        now_s += 10 * left_s
        assert wanted(signals) is Request.NONE
        return
    now_s = 50.0 + save_at_s - 0.1
    assert wanted(signals) is Request.NONE
    now_s = 50.0 + save_at_s + 0.1
    assert wanted(signals) is Request.REQUEUE


def test_a_jump_of_the_wall_clock_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}
    job = read_job(env, asks=False)
    assert job.ends_at_s is not None
    assert 990 < job.ends_at_s - time.monotonic() <= 1000
    signals = Signals(job.ends_at_s, 100.0)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert wanted(signals) is Request.NONE


def test_the_scheduler_is_asked_when_the_environment_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 300))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho JobId=$4 RunTime=00:01:00 EndTime={end} Deadline=N/A\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = read_job({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, asks=True)
    assert (job.id, job.num_restarts) == ("7", 2)
    assert job.ends_at_s is not None
    assert 295 < job.ends_at_s - time.monotonic() < 305
    assert read_job({"SLURM_JOB_ID": "7"}, asks=False).ends_at_s is None
    scontrol.write_text("#!/bin/sh\necho EndTime=Unknown\n")
    assert read_job({"SLURM_JOB_ID": "7"}, asks=True).ends_at_s is None
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert read_job({"SLURM_JOB_ID": "7"}, asks=True).ends_at_s is None


def test_no_job_has_no_end() -> None:
    job = read_job({}, asks=True)
    assert (job.id, job.ends_at_s) == ("local", None)


def test_a_run_is_finished_only_with_all_its_steps(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, 6)
    write_marker(tmp_path / FINISHED_FILE, 6)
    assert is_finished(tmp_path, 6)
    assert not is_finished(tmp_path, 7)
    (tmp_path / FINISHED_FILE).write_text("")
    assert not is_finished(tmp_path, 6)


def test_the_marker_carries_the_job(tmp_path: Path) -> None:
    assert requeue_marker(tmp_path, "12").name == "requeue.12"
