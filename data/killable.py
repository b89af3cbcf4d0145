"""Work in a process that can be killed: what a medium does to its decoder ends there.

A process gets requests over a socket, one at a time. Its answers are JSON: nothing that comes from
one that has opened untrusted media is unpickled. Processes are forked from a server that has
imported what they need and nothing of the trainer's, so that a new one is there in milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Timer
from typing import Any

import torch

GRACE_S = 5.0
"""Beyond the limit of a request, which work that still goes on keeps by itself."""
START_LIMIT_S = 120.0
"""How long the first answer may take: the server imports torch before it forks."""
MAX_ANSWER_BYTES = 1 << 20
PRELOADED = ["kinodit.data.worker", "kinodit.data.scores"]
"""Modules that are imported before processes are forked."""

Answer = dict[str, Any]


class HungError(Exception):
    """The process gave no answer in time, and was killed."""


class CrashedError(Exception):
    """The process died over a request, and so did the one that took its place."""


class KillableProcess:
    """One process that answers one request at a time. For one thread.

    A process that dies or hangs is replaced before the next request.
    """

    def __init__(self, serve: Callable[[Connection], None], name: str) -> None:
        """`serve` is what the process runs, a function of a module: it calls `answers`."""
        self._serve = serve
        self._name = name
        self._process: BaseProcess | None = None
        self._link: Connection | None = None
        self._is_stopped = False
        self.num_started = 0

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return self._process.pid if self._process else None

    def ask(self, send: Callable[[Connection, int, bool], None], limit_s: float) -> Answer:
        """The answer to what `send` writes, given (link, process id, whether the process is new).

        A process that dies is replaced and asked once more: it may have been killed by someone
        else, for want of memory say.

        Raises:
            HungError: no answer came within `limit_s` and `GRACE_S`.
            CrashedError: the process died, and so did the next one; or it was stopped.
            RuntimeError: the work itself failed, with its stack: a fault of ours.
        """
        for _ in range(2):
            answer = self._ask(send, limit_s + GRACE_S)
            if answer is not None:
                break
        else:
            raise CrashedError
        if "fault" in answer:
            raise RuntimeError(f"a worker failed:\n{answer['fault']}")
        return answer

    def stop(self) -> None:
        """Ends what is being asked, from another thread: that gets a CrashedError."""
        self._is_stopped = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._link is not None:
            self._link.close()
        self._process = self._link = None

    def _ask(self, send: Callable[[Connection, int, bool], None], limit_s: float) -> Answer | None:
        """The answer; None if the process died."""
        if self._is_stopped:
            return None
        is_new = self._process is None
        if is_new:
            self._start()
            limit_s += START_LIMIT_S
        assert self._link is not None and self._process is not None
        assert self._process.pid is not None
        # A process that was stopped takes nothing in: it is killed, and sending then fails.
        timer = Timer(limit_s, self._process.kill)
        try:
            timer.start()
            try:
                send(self._link, self._process.pid, is_new)
            finally:
                timer.cancel()
            if self._link.poll(limit_s):
                answer: Answer = json.loads(self._link.recv_bytes(MAX_ANSWER_BYTES))
                return answer
        except (EOFError, OSError, ValueError):
            self.close()
            return None
        self.close()
        raise HungError

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=self._serve, args=(theirs,), name=self._name, daemon=True
        )
        self._process.start()
        theirs.close()
        self._link = ours
        self.num_started += 1


def answers(
    link: Connection, receive: Callable[[Connection], Any], work: Callable[[Any], Answer]
) -> None:
    """What a process runs: `work` on each request that is received, until the other end is closed.

    Whatever `work` raises is a fault of ours: told with its stack, and raised where it can be seen.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    while True:
        try:
            request = receive(link)
        except (EOFError, OSError):
            return
        try:
            answer = work(request)
        except Exception:
            link.send_bytes(json.dumps({"fault": traceback.format_exc()[-8000:]}).encode())
            raise
        link.send_bytes(json.dumps(answer).encode())
