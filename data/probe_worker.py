"""What a medium is, found out in a process that it may hang or crash: for tools that open many."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from kinodit.data.killable import Answer, CrashedError, HungError, KillableProcess, answers
from kinodit.data.probe import MediumError, MediumFacts, probe
from kinodit.models.errors import MissingExtraError, UserError

LIMIT_S = 60.0
"""How long reading all packets of one medium may take."""


class ProbeWorker:
    """One process that probes one medium at a time; it is replaced when it dies or hangs."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        """`limit_s`: how long a medium may take."""
        self._limit_s = limit_s
        self._process = KillableProcess(_serve)

    def probe(self, extension: str, data: bytes) -> MediumFacts:
        """As `kinodit.data.probe.probe`.

        Raises:
            MediumError: as there; or the process died over this medium twice, or was killed
                because it did not answer in time.
            UserError: PyAV or Pillow is not installed.
        """
        try:
            said = self._process.ask(
                lambda link, pid, is_new: link.send((extension, bytes(data))), self._limit_s
            )
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
        return MediumFacts(**said)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


def _serve(link: Connection) -> None:
    """The worker's process."""
    answers(link, lambda link: link.recv(), _answer)


def _answer(request: Any) -> Answer:
    try:
        return vars(probe(*request))
    except MediumError as error:
        return {"refused": str(error)[:4000]}
    except MissingExtraError as error:
        return {"missing": str(error)}
