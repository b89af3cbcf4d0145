"""Processes forked from one that has imported what they need, and nothing else.

A new process is there in milliseconds, wherever the caller's threads are, and without importing
the caller's main module again. The server is a fork of the caller where that asks for it before it
has threads, devices or connections (`fork_early`), and a new interpreter otherwise. All of them end
with the caller: the server when its socket is closed, the processes when the server ends.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

PRELOADED = ("av", "PIL.Image")
"""Modules that are imported before processes are forked, beside that of what they run: those open
media when they are asked to. One that is not installed is left out."""

START_LIMIT_S = 120.0
"""How long a server may take to answer: it may import torch before."""

_MAX_REQUEST_BYTES = 4096
_PR_SET_PDEATHSIG = 1
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends to every process of a job is the caller's to handle."""

Serve = Callable[[Connection], None]
"""What a process runs, given its end of a link: a function of a module."""


class _Server:
    """The caller's side of one server."""

    def __init__(self, *, fork: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(START_LIMIT_S)
        self._socket = ours
        self._spawned: subprocess.Popen[bytes] | None = None
        self._forked = 0
        with theirs:
            if not fork:
                code = (
                    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
                    "from kinodit.data.fork_server import serve; serve(int(sys.argv[1]))"
                )
                number = theirs.fileno()
                command = [sys.executable, "-c", code, str(number), json.dumps(sys.path)]
                self._spawned = subprocess.Popen(command, pass_fds=[number])
                return
            self._forked = os.fork()
            if not self._forked:
                _become_server(theirs.detach())

    def ask(self, request: str, descriptors: Sequence[int] = ()) -> int:
        """The number that the server answers with. Raises OSError if there is no server."""
        try:
            socket.send_fds(self._socket, [request.encode()], list(descriptors))
            answer = self._socket.recv(_MAX_REQUEST_BYTES)
            if not answer:
                raise BrokenPipeError("the server has ended")
            return int(answer)
        except OSError:
            # An answer that comes late must not be taken for that to another request.
            self._socket.close()
            raise

    def close(self) -> None:
        """Ends the server, and the processes that it has forked."""
        self._socket.close()
        if self._spawned is not None:
            self._spawned.kill()
            self._spawned.wait()
        else:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._forked, signal.SIGKILL)
                os.waitpid(self._forked, 0)


_server: _Server | None = None
_owner = 0
_lock = threading.Lock()


def fork_early() -> None:
    """Makes this process's server by a fork, in no time.

    For a process that has imported what it needs and has neither threads of its own nor devices,
    connections or secrets in memory: all that is there when this is called is in the server, too.
    Files that are open are closed there.
    """
    global _server, _owner
    with _lock:
        if _server is None or _owner != os.getpid():
            _server, _owner = _Server(fork=True), os.getpid()


def stop() -> None:
    """Ends the server and what it has forked, if there is one; the next process gets a new one."""
    global _server
    with _lock:
        if _server is not None and _owner == os.getpid():
            _server.close()
        _server = None


atexit.register(stop)


class ForkedProcess:
    """A process of the server that runs `serve`, and the link to it."""

    def __init__(self, serve: Serve) -> None:
        """Raises OSError if no server can be made."""
        ours, theirs = socket.socketpair()
        name = f"{serve.__module__}:{serve.__qualname__}"
        with theirs:
            self.pid, self._server = _fork(name, theirs.fileno())
        self._socket = ours
        self.link = Connection(os.dup(ours.fileno()))

    def limit_sends(self, limit_s: float) -> None:
        """Lets sending fail with an OSError where the process takes nothing in for so long."""
        seconds_and_us = struct.pack("ll", math.ceil(limit_s), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds_and_us)

    def kill(self) -> None:
        """Ends the process; from any thread, and as often as one likes."""
        self._tell("kill")

    def close(self) -> None:
        """Ends the process, and waits until it is gone."""
        self._tell("end")
        self.link.close()
        self._socket.close()

    def _tell(self, what: str) -> None:
        # A server that is gone has taken its processes along.
        with _lock, suppress(OSError):
            self._server.ask(f"{what} {self.pid}")


def _fork(name: str, descriptor: int) -> tuple[int, _Server]:
    global _server, _owner
    with _lock:
        if _server is not None and _owner == os.getpid():
            with suppress(OSError):
                return _server.ask(f"fork {name}", [descriptor]), _server
            _server.close()
        _server, _owner = _Server(fork=False), os.getpid()
        return _server.ask(f"fork {name}", [descriptor]), _server


def _become_server(descriptor: int) -> NoReturn:
    """What a fork of the caller does, in whose frames it must never go on."""
    try:
        # What the caller's objects would do when they are collected is not the server's to do.
        gc.freeze()
        # Whatever the caller has put in their places writes to files that are closed now.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        faulthandler.disable()
        faulthandler.unregister(signal.SIGUSR2)
        for path in list(Path("/proc/self/fd").iterdir()):
            if (number := int(path.name)) > 2 and number != descriptor:
                with suppress(OSError):
                    os.close(number)
        serve(descriptor)
    finally:
        os._exit(1)


def serve(descriptor: int) -> NoReturn:
    """What the server's process runs: forks and ends processes until its socket is closed."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # Nobody is left to hear of it where the caller is gone.
    with suppress(BrokenPipeError, ConnectionResetError):
        _answer_requests(socket.socket(fileno=descriptor))
    os._exit(0)


def _answer_requests(server: socket.socket) -> None:
    me, children = os.getpid(), set[int]()
    while True:
        request, descriptors, _, _ = socket.recv_fds(server, _MAX_REQUEST_BYTES, 1)
        if not request:
            return
        what, _, rest = request.decode().partition(" ")
        if what == "fork":
            _preload(rest.partition(":")[0])
            pid = os.fork()
            if pid == 0:
                server.close()
                _become_process(rest, descriptors[0], me)
            children.add(pid)
            os.close(descriptors[0])
        else:
            pid = int(rest)
            if pid in children:
                # Not waited for before, so that the number is still its own.
                os.kill(pid, signal.SIGKILL)
                if what == "end":
                    os.waitpid(pid, 0)
                    children.remove(pid)
        server.send(str(pid).encode())


@cache
def _preload(module: str) -> None:
    """Imports, once, what processes of a module need; not before there is one."""
    for name in (module, *PRELOADED):
        with suppress(ImportError):
            importlib.import_module(name)


def _become_process(name: str, descriptor: int, parent: int) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            module, _, function = name.partition(":")
            run: Serve = getattr(importlib.import_module(module), function)
            # Whoever would hear of it may be gone.
            with suppress(BrokenPipeError, ConnectionResetError):
                run(Connection(descriptor))
        code = 0
    finally:
        # What is raised ends here, in whose frames the server's must not go on.
        if code:
            traceback.print_exc()
        os._exit(code)
