"""Work in a process that can be killed: what a medium does to its decoder ends there.

A process gets requests over a socket, one at a time. Its answers are JSON: nothing that comes from
one that has opened untrusted media is unpickled. A new one is there in milliseconds
(`kinodit.data.fork_server`).
"""

from __future__ import annotations

import json
import resource
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from kinodit.data.checksums import Bytes
from kinodit.data.fork_server import ForkedProcess, Serve

GRACE_S = 5.0
"""Beyond the limit of a request, which work that still goes on keeps by itself."""
MAX_ANSWER_BYTES = 1 << 20

Answer = dict[str, Any]


class HungError(Exception):
    """The process gave no answer in time, and was killed."""


class CrashedError(Exception):
    """The process died over a request, and so did the one that took its place."""


def send_parts(link: Connection, request: object, parts: Sequence[Bytes]) -> None:
    """`request` and media beside it, which are written from where they lie: nothing is copied."""
    link.send((request, len(parts)))
    for part in parts:
        link.send_bytes(part)


def receive_parts(link: Connection) -> tuple[Any, list[bytes]]:
    """What `send_parts` wrote. Raises EOFError, OSError once the other end is closed."""
    request, count = link.recv()
    return request, [link.recv_bytes() for _ in range(count)]


class KillableProcess:
    """One process that answers one request at a time. For one thread.

    A process that dies or hangs is replaced before the next request.
    """

    def __init__(self, serve: Serve) -> None:
        """`serve` is what the process runs: it calls `answers`."""
        self._serve = serve
        self._process: ForkedProcess | None = None
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
            self._process.close()
        self._process = None

    def _ask(self, send: Callable[[Connection, int, bool], None], limit_s: float) -> Answer | None:
        """The answer; None if the process died."""
        if self._is_stopped:
            return None
        is_new = self._process is None
        if self._process is None:
            self._process = ForkedProcess(self._serve)
            self.num_started += 1
        link = self._process.link
        try:
            # A process that was stopped takes nothing in.
            self._process.limit_sends(limit_s)
            send(link, self._process.pid, is_new)
            if link.poll(limit_s):
                answer: Answer = json.loads(link.recv_bytes(MAX_ANSWER_BYTES))
                return answer
        except (EOFError, OSError, ValueError):
            self.close()
            return None
        self.close()
        raise HungError


def answers(
    link: Connection, receive: Callable[[Connection], Any], work: Callable[[Any], Answer]
) -> None:
    """What a process runs: `work` on each request that is received, until the other end is closed.

    Whatever `work` raises is a fault of ours: told with its stack, and raised where it can be seen.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
