"""Where media are decoded, as a recipe says: in the threads that ask, or in processes."""

from __future__ import annotations

import logging
import time
from threading import Lock, local
from typing import Literal

from kinodit.data.at_work import AtWork
from kinodit.data.config import DecodeConfig
from kinodit.data.decode import DecodedMedia, decode
from kinodit.data.killable import GRACE_S
from kinodit.data.picture import CENTRE, Crop
from kinodit.data.record import Record
from kinodit.data.worker import DecodeWorker

_log = logging.getLogger("kinodit")


class Decoders:
    """Decodes for the threads of this process, which share it.

    With "processes" each thread has one of its own. With "threads" a decoder that hangs keeps its
    thread for good; `at_work` says over what.
    """

    def __init__(
        self, workers: Literal["threads", "processes"], at_work: AtWork | None = None
    ) -> None:
        """`workers` is `data.workers` of a recipe; notes go to `at_work`, if it is given."""
        self.workers: list[DecodeWorker] = []
        self.are_threads = workers == "threads"
        self._at_work = (at_work or AtWork()) if self.are_threads else None
        self._told: set[tuple[int, float]] = set()
        self._own = local()
        self._lock = Lock()

    def decode(
        self,
        record: Record,
        config: DecodeConfig,
        window_u: float = 0.0,
        crop_u: Crop = CENTRE,
        place: str = "",
    ) -> DecodedMedia:
        """As `kinodit.data.decode.decode`; `place` says where the record is from, for notes.

        Raises:
            DecodeError: as there; in a process also if that crashed or hung.
            UserError: PyAV is not installed.
        """
        if self._at_work is not None:
            noted = self._at_work.begin(f"sample {record.key!r}{place and ' '}{place}")
            try:
                return decode(record, config, window_u, crop_u)
            finally:
                self._at_work.end(noted)
        if not hasattr(self._own, "worker"):
            self._own.worker = DecodeWorker()
            with self._lock:
                self.workers.append(self._own.worker)
        worker: DecodeWorker = self._own.worker
        return worker.decode(record, config, window_u, crop_u)

    def tell_late(self, config: DecodeConfig) -> None:
        """Says, once, what a thread has been at for longer than `config` allows."""
        if self._at_work is None:
            return
        now_s = time.monotonic()
        for note in self._at_work.read():
            is_late = now_s - note.since_s > config.decode_limit_s + GRACE_S
            if is_late and (note.thread, note.since_s) not in self._told:
                self._told.add((note.thread, note.since_s))
                _log.warning(
                    "decoding %s: data.decode_limit_s allows %g s. A thread cannot be ended: "
                    "data.workers=processes replaces such a sample and goes on",
                    note.told(now_s),
                    config.decode_limit_s,
                )

    def close(self) -> None:
        """Ends the processes; no thread may be decoding any more."""
        for worker in self.workers:
            worker.close()
        self.workers.clear()
