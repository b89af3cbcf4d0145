"""Processes are there at once, are replaced with their server, and never outlive their caller."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kinodit.data import fork_server
from kinodit.data.fork_server import ForkedProcess
from tests.support.decoders import hold

for name in fork_server.PRELOADED:
    # What a server would import else, each time that one is forked here.
    importlib.import_module(name)


def echo(link: Connection) -> None:
    """Sends back what it gets, with the number of its own process."""
    while True:
        try:
            link.send((os.getpid(), link.recv()))
        except EOFError:
            return


def hang(link: Connection) -> None:
    link.send(os.getpid())
    hold()


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    fork_server.stop()
    fork_server.fork_early()
    yield
    fork_server.stop()
    fork_server.fork_early()


def is_gone(pid: int) -> bool:
    """Within a few seconds."""
    end_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end_s:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_each_process_has_a_link_of_its_own() -> None:
    one, two = ForkedProcess(echo), ForkedProcess(echo)
    one.link.send("a")
    two.link.send("b")
    assert one.link.recv() == (one.pid, "a") and two.link.recv() == (two.pid, "b")
    assert parent_of(one.pid) == parent_of(two.pid) != os.getpid()
    one.kill()
    one.kill()
    assert one.link.poll(5)
    with pytest.raises((EOFError, ConnectionResetError)):
        one.link.recv()
    one.close()
    assert not Path(f"/proc/{one.pid}").exists()
    two.link.send("c")
    assert two.link.recv() == (two.pid, "c")
    two.close()


def test_what_is_open_here_is_closed_there(tmp_path: Path) -> None:
    with (tmp_path / "open").open("wb") as file:
        fork_server.stop()
        fork_server.fork_early()
        process = ForkedProcess(echo)
        process.link.send("")
        process.link.recv()
        for pid in (process.pid, parent_of(process.pid)):
            held = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()]
            assert Path(file.name) not in held and len(held) <= 5
        process.close()


def test_signals_to_a_whole_job_end_no_process() -> None:
    process = ForkedProcess(echo)
    process.link.send(1)
    process.link.recv()
    for pid in (process.pid, parent_of(process.pid)):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid, number)
    process.link.send(2)
    assert process.link.recv() == (process.pid, 2)
    process.close()


def test_a_server_that_is_killed_takes_its_processes_along() -> None:
    hung = ForkedProcess(hang)
    assert hung.link.recv() == hung.pid
    os.kill(parent_of(hung.pid), signal.SIGKILL)
    assert is_gone(hung.pid)
    hung.kill()
    hung.close()


@pytest.mark.slow
def test_without_a_server_another_interpreter_is_one() -> None:
    fork_server.stop()
    process = ForkedProcess(echo)
    process.link.send("here")
    assert process.link.recv() == (process.pid, "here")
    process.close()


def test_nothing_outlives_a_caller_that_is_killed() -> None:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        fork_server.fork_early()
        process = ForkedProcess(hang)
        process.link.recv()
        os.write(theirs, f"{process.pid} {parent_of(process.pid)}".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    hung, server = map(int, os.read(ours, 100).split())
    os.close(ours)
    os.close(theirs)
    assert server != os.getpid()
    assert is_gone(hung) and is_gone(server)


def test_a_function_that_fails_says_so_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    fork_server.stop()
    fork_server.fork_early()
    process = ForkedProcess(fails)
    with pytest.raises((EOFError, ConnectionResetError)):
        process.link.recv()
    process.close()
    assert "RuntimeError: on purpose" in capfd.readouterr().err


def fails(link: Connection) -> None:
    raise RuntimeError("on purpose")


def test_sending_to_a_process_that_takes_nothing_in_ends() -> None:
    process = ForkedProcess(hang)
    process.link.recv()
    process.limit_sends(0.5)
    start_s = time.monotonic()
    with pytest.raises(OSError):
        process.link.send(bytes(64 << 20))
    assert time.monotonic() - start_s < 20
    process.close()
