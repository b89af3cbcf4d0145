"""One job at a time in a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from kinodit.trainer.resilience.errors import LockedError
from kinodit.trainer.resilience.lock import LOCK_FILE, RunLock

NUM_RACES = 20
NUM_RACERS = 4


def race(folder: str, number: int, job: str, go: Event, over: Event, answer: Connection) -> None:
    go.wait()
    try:
        with RunLock(Path(folder), f"{job}{number}", 0):
            answer.send("won")
            over.wait()
    except LockedError:
        answer.send("refused")


def abandoned(folder: Path, **fields: object) -> None:
    """The lock of a process elsewhere, last renewed two minutes ago."""
    with RunLock(folder, "1", 0):
        text = json.loads((folder / LOCK_FILE).read_text())
    (folder / LOCK_FILE).write_text(json.dumps({**text, "pid_space": "elsewhere", **fields}))
    os.utime(folder / LOCK_FILE, (time.time() - 120, time.time() - 120))


@pytest.mark.parametrize("stale", [False, True])
def test_of_those_that_race_exactly_one_wins(stale: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(NUM_RACES // 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        if stale:
            abandoned(folder)
        go, over = context.Event(), context.Event()
        pipes = [context.Pipe() for _ in range(NUM_RACERS)]
        racers = [
            context.Process(target=race, args=(str(folder), index, "j", go, over, theirs))
            for index, (_, theirs) in enumerate(pipes)
        ]
        for racer in racers:
            racer.start()
        go.set()
        answers = [ours.recv() for ours, _ in pipes]
        over.set()
        for racer in racers:
            racer.join()
        for end in (end for pipe in pipes for end in pipe):
            end.close()
        assert sorted(answers) == ["refused"] * (NUM_RACERS - 1) + ["won"]
        assert not list(folder.iterdir())


def test_names_the_owner(tmp_path: Path) -> None:
    with RunLock(tmp_path, "4711", 0):
        with pytest.raises(LockedError, match=f"process {os.getpid()} of job 4711 on "):
            RunLock(tmp_path, "4712", 0).__enter__()
        assert (tmp_path / LOCK_FILE).is_file()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_requeued_job_enters_its_own_folder_again(tmp_path: Path) -> None:
    with RunLock(tmp_path, "4711", 1):
        with pytest.raises(LockedError):
            RunLock(tmp_path, "4711", 1).__enter__()
        with pytest.raises(LockedError):
            RunLock(tmp_path, "4712", 2).__enter__()
        with RunLock(tmp_path, "4711", 2):
            pass


def test_without_a_job_there_is_no_second_attempt(tmp_path: Path) -> None:
    with RunLock(tmp_path, "local", 0), pytest.raises(LockedError):
        RunLock(tmp_path, "local", 1).__enter__()


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        RunLock(tmp_path, "1", 0).__enter__()
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path, "2", 0):
        pass


def test_a_process_elsewhere_is_alive_while_it_renews(tmp_path: Path) -> None:
    abandoned(tmp_path)
    os.utime(tmp_path / LOCK_FILE)
    with pytest.raises(LockedError, match="last sign 0 s ago"):
        RunLock(tmp_path, "2", 0).__enter__()
    os.utime(tmp_path / LOCK_FILE, (time.time() - 120, time.time() - 120))
    with RunLock(tmp_path, "2", 0, renew_s=0.02, stale_s=0.5) as held:
        time.sleep(0.7)
        owner = json.loads((tmp_path / LOCK_FILE).read_text())["token"]
        assert owner == held._owner.token
        abandoned_after = RunLock(tmp_path, "3", 0, stale_s=0.5)
        with pytest.raises(LockedError):
            abandoned_after.__enter__()


def test_the_clock_of_this_host_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned(tmp_path)
    os.utime(tmp_path / LOCK_FILE)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    with pytest.raises(LockedError):
        RunLock(tmp_path, "2", 0).__enter__()


def test_a_takeover_that_was_killed_does_not_lock_for_ever(tmp_path: Path) -> None:
    abandoned(tmp_path, token="old")
    right = tmp_path / f".{LOCK_FILE}.takeover.old"
    right.touch()
    os.utime(right, (time.time() - 120, time.time() - 120))
    with RunLock(tmp_path, "2", 0):
        pass


def test_what_is_not_a_lock_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("mine")
    with pytest.raises(LockedError, match="is not a lock"):
        RunLock(tmp_path, "2", 0).__enter__()
    assert (tmp_path / LOCK_FILE).read_text() == "mine"
