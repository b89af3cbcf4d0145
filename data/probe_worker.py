"""What a medium is, found out in a process that it may hang or crash: for tools that open many."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

from kinodit.data.checksums import Bytes
from kinodit.data.killable import (
    Answer,
    CrashedError,
    HungError,
    KillableProcess,
    answers,
    receive_parts,
    send_parts,
)
from kinodit.data.probe import MediumError, MediumFacts, probe
from kinodit.data.record import MAX_MEMBER_BYTES
from kinodit.data.remux import remux
from kinodit.models.errors import MissingExtraError, UserError

LIMIT_S = 60.0
"""How long reading all packets of one medium may take."""


class ProbeWorker:
    """One process that opens one medium at a time; it is replaced when it dies or hangs.

    There is none before the first medium.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        """`limit_s`: how long a medium may take."""
        self._limit_s = limit_s
        self._process = KillableProcess(_serve)

    def probe(self, extension: str, data: Bytes) -> MediumFacts:
        """As `kinodit.data.probe.probe`.

        Raises:
            MediumError: as there; or the process died over this medium twice, or was killed
                because it did not answer in time.
            UserError: PyAV or Pillow is not installed.
        """
        return MediumFacts(
            **self._ask(lambda link, pid, is_new: send_parts(link, (extension, False), [data]))
        )

    def remux(self, data: Bytes, demuxer: str) -> bytes:
        """As `kinodit.data.remux.remux`.

        Raises:
            MediumError, UserError: as there and in `probe`; or the mp4 is longer than a member of a
                shard may be.
        """
        room = os.memfd_create("kinodit-remux")
        try:

            def send(link: Connection, pid: int, is_new: bool) -> None:
                # Its place is shared with the process, and one that died has moved it.
                os.lseek(room, 0, os.SEEK_SET)
                os.ftruncate(room, 0)
                send_parts(link, (demuxer, True), [data])
                send_handle(link, room, pid)

            self._ask(send)
            num_bytes = os.fstat(room).st_size
            if num_bytes > MAX_MEMBER_BYTES:
                raise MediumError(f"as an mp4 it has more than {MAX_MEMBER_BYTES >> 20} MiB")
            os.lseek(room, 0, os.SEEK_SET)
            with os.fdopen(room, "rb", closefd=False) as file:
                return file.read(num_bytes)
        finally:
            os.close(room)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def _ask(self, send: Callable[[Connection, int, bool], None]) -> Answer:
        try:
            said = self._process.ask(send, self._limit_s)
        except CrashedError as error:
            raise MediumError("its decoder crashed, and did so again in a new process") from error
        except HungError as error:
            raise MediumError(
                f"opening it takes longer than {self._limit_s:g} s: its decoder hung and was killed"
            ) from error
        if "refused" in said:
            raise MediumError(said["refused"])
        if "missing" in said:
            raise UserError(said["missing"])
        return said


def _serve(link: Connection) -> None:
    """The worker's process."""
    answers(link, _received, _answer)


def _received(link: Connection) -> tuple[str, bytes, int]:
    """(extension or demuxer, medium, descriptor of where an mp4 is asked for, or -1)."""
    (name, is_remuxed), (data,) = receive_parts(link)
    return name, data, recv_handle(link) if is_remuxed else -1


def _answer(request: tuple[str, bytes, int]) -> Answer:
    name, data, descriptor = request
    try:
        if descriptor < 0:
            return vars(probe(name, data))
        with os.fdopen(descriptor, "wb") as file:
            file.write(remux(data, name))
        return {}
    except MediumError as error:
        return {"refused": str(error)[:4000]}
    except MissingExtraError as error:
        return {"missing": str(error)}
