"""Where a run's numbers and clips go: JSON lines always, wandb and TensorBoard when asked.

Only rank 0 makes a `Sinks`. The JSON lines are written in the caller's thread, since they are the
record that the report is made from. wandb and TensorBoard work in a thread of their own: a slow
or unreachable server never holds up a step, and the first failure of either is one warning, after
which the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.trainer.environment import save_environment
from kinodit.trainer.events import EVENTS_FILE, EventKind, event_row
from kinodit.trainer.jsonl import JsonLines, read_rows
from kinodit.trainer.redact import redact, redact_text, redact_values, secret_values
from kinodit.trainer.services import Sink, TensorBoardSink, WandbSink

METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "run_id"
MAX_PENDING = 10_000
"""Rows that may wait for a stalled service; they are in the JSON lines anyway."""

_log = logging.getLogger("kinodit")


@dataclass(frozen=True)
class LogConfig:
    """What is logged, and where to beside metrics.jsonl.

    every_steps: steps in one row of metrics; wandb: "offline" writes a run that `wandb sync`
    uploads later; wandb_project: where it goes; tensorboard: also write event files; ledger: also
    write which samples each step was trained on, for `kinodit data verify-ledger`.
    """

    every_steps: int = 10
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_project: str = "kinodit"
    tensorboard: bool = False
    ledger: bool = False

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"log.every_steps={self.every_steps}: must be at least 1")
        if not self.wandb_project or "/" in self.wandb_project:
            raise ConfigError(f"log.wandb_project={self.wandb_project!r}: must be a plain name")


def require_extras(config: LogConfig) -> None:
    """Check that what `config` asks for is installed; cheap, so that every rank can.

    Raises:
        MissingExtraError: wandb or tensorboard is not.
    """
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        purpose = f"log.wandb={config.wandb} (log.wandb=off does without)"
        raise MissingExtraError("wandb", "wandb", purpose)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "log.tensorboard=true")


def stored_run_id(run_dir: Path, proposed: str | None = None) -> str:
    """The run's identifier in RUN/run_id, made (or taken from `proposed`) at the first start."""
    path = run_dir / RUN_ID_FILE
    if path.is_file():
        return path.read_text().strip()
    run_id = proposed or uuid.uuid4().hex[:12]
    path.write_text(run_id + "\n")
    return run_id


class Sinks:
    """Everything that a run writes while it trains, apart from checkpoints and sample files.

    run_id names the run in wandb, once and for all resumes; None: the one stored in the run
    folder. On a resume, rows after `resume_step` are removed first: they will be written again.

    Raises:
        MissingExtraError: `config` asks for a library that is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        run_id: str | None,
        resumed: bool,
        resolved_config: Mapping[str, Any],
        *,
        resume_step: int = 0,
        world_size: int = 1,
    ) -> None:
        require_extras(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.run_id = stored_run_id(run_dir, run_id)
        self._step = resume_step
        self._known_secrets = secret_values(os.environ)
        save_environment(run_dir, world_size)
        # Events are history and stay; metrics of steps that will be taken again would be doubled.
        last_step = resume_step if resumed else -1
        self._metrics = JsonLines(run_dir / METRICS_FILE, lambda row: row["step"] <= last_step)
        self._events = JsonLines(run_dir / EVENTS_FILE)
        self._guarded: list[_Guarded] = []
        if config.wandb != "off":
            shown = redact_values(redact(resolved_config), self._known_secrets)
            wandb = WandbSink(run_dir, config.wandb_project, config.wandb, self.run_id, shown)
            self._guarded.append(_Guarded("wandb", wandb, self._warn))
        if config.tensorboard:
            purge_step = resume_step + 1 if resumed else None
            tensorboard = TensorBoardSink(run_dir, purge_step)
            self._guarded.append(_Guarded("tensorboard", tensorboard, self._warn))

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row, which has at least "kind" and "step", to metrics.jsonl and the services."""
        self._step = int(row["step"])
        self._metrics.append(row)
        for sink in self._guarded:
            sink.metrics(row)

    def has_row(self, kind: str, step: int) -> bool:
        """Whether metrics.jsonl has a row of this kind and step."""
        rows = read_rows(self.run_dir / METRICS_FILE)
        return any(row and (row["kind"], row["step"]) == (kind, step) for row in rows)

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """Append what happened to events.jsonl, without credentials that `message` may contain."""
        self._events.append(event_row(kind, step, message, self._known_secrets))

    def media(self, step: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Pass on samples: `entries` as in samples/step-*/index.json, files in that folder."""
        folder = self.run_dir / "samples" / f"step-{step:08d}"
        samples = [(folder / str(entry["file"]), str(entry["prompt"])) for entry in entries]
        for sink in self._guarded:
            sink.media(step, samples)

    def close(self) -> None:
        """Flush everything; waits at most `close_timeout_s` for each service."""
        for sink in self._guarded:
            sink.close()
        self._metrics.close()
        self._events.close()

    def _warn(self, message: str) -> None:
        message = redact_text(message, self._known_secrets)
        _log.warning(message)
        self.event("warning", self._step, message)


class _Guarded:
    """A sink in a thread of its own, dropped with one warning at its first failure."""

    def __init__(self, name: str, sink: Sink, warn: Callable[[str], None]) -> None:
        self._name, self._sink, self._warn = name, sink, warn
        # An executor, since it keeps whatever a call raised for the thread that asks.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: deque[Future[str | None]] = deque()
        self._alive = True
        self._submit(sink.open)

    def metrics(self, row: Mapping[str, Any]) -> None:
        self._submit(self._sink.metrics, row)

    def media(self, step: int, samples: Sequence[tuple[Path, str]]) -> None:
        self._submit(self._sink.media, step, samples)

    def close(self) -> None:
        self._submit(self._sink.close)
        limit_s = self._sink.close_timeout_s
        if self._alive and wait(self._pending, timeout=limit_s).not_done:
            self._drop(f"not finished after {limit_s:.0f} s")
        self._collect()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, function: Callable[..., str | None], *arguments: Any) -> None:
        self._collect()
        if self._alive:
            self._pending.append(self._thread.submit(function, *arguments))

    def _collect(self) -> None:
        while self._alive and self._pending and self._pending[0].done():
            done = self._pending.popleft()
            error = done.exception()
            if error is None:
                if (said := done.result()) is not None:
                    self._warn(said)
            else:
                self._drop(f"{type(error).__name__}: {' '.join(str(error).split())}")
        if self._alive and len(self._pending) > MAX_PENDING:
            self._drop(f"{len(self._pending)} rows wait for it")

    def _drop(self, reason: str) -> None:
        self._alive = False
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._warn(
            f"{self._name} is off for the rest of this run ({reason}); {METRICS_FILE} goes on"
        )
