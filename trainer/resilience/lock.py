"""One job at a time in a run's folder, and no endless restarts.

The lock is a file that is created exclusively (`O_EXCL` is atomic on NFS too, which file locks are
not everywhere); whoever holds it renews its time of change. A job that is requeued enters its own
folder again at once. The lock of a process that is dead, or has not renewed it for `STALE_S`, is
taken over by one of those that want it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kinodit.trainer.resilience.errors import LockedError

LOCK_FILE = "lock"
RENEW_S = 10.0
STALE_S = 60.0
"""Six renewals missed. Ages are taken from the file server's clock, never from this host's."""


def keep_to_group() -> None:
    """What this process writes is its user's to change, its group's to read, and nobody else's."""
    os.umask(os.umask(0o027) | 0o027)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    pid_space: where `pid` means a process: this boot of this machine, in this container
    attempt:   how often the job had been requeued
    """

    host: str
    pid: int
    pid_space: str
    job_id: str
    attempt: int
    token: str

    def __str__(self) -> str:
        job = "" if self.job_id == "local" else f" of job {self.job_id}"
        return f"process {self.pid}{job} on {self.host}"


class RunLock:
    """The lock of a run's folder while it is entered; a thread renews it. Rank 0 only.

    Raises on entering:
        LockedError: another job, or another process of this one, is alive in the folder.
    """

    def __init__(
        self,
        run_dir: Path,
        job_id: str,
        attempt: int,
        *,
        renew_s: float = RENEW_S,
        stale_s: float = STALE_S,
    ) -> None:
        self._path = run_dir / LOCK_FILE
        self._owner = Owner(
            socket.gethostname(), os.getpid(), _pid_space(), job_id, attempt, uuid.uuid4().hex
        )
        self._renew_s, self._stale_s = renew_s, stale_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)

    def __enter__(self) -> Self:
        while not self._create():
            held = self._read()
            if held is None:
                continue
            owner, age_s = held
            if not self._may_take(owner, age_s):
                raise LockedError(
                    f"{self._path.parent} is in use by {owner} (last sign {age_s:.0f} s ago): "
                    "wait for it, stop it, or choose another run.name"
                )
            if self._take_over(owner):
                break
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        held = self._read()
        if held is not None and held[0] == self._owner:
            self._path.unlink(missing_ok=True)

    def _draft(self) -> Path:
        """A file with our name in it, to be given the lock's name at once and whole."""
        draft = self._path.with_name(f".{LOCK_FILE}.{self._owner.token}")
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o640)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(self._owner), file)
        return draft

    def _create(self) -> bool:
        """Whether the lock is ours now."""
        draft = self._draft()
        try:
            # A link fails where the name exists, like O_EXCL, and is as atomic.
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _take_over(self, owner: Owner) -> bool:
        """Whether we replaced the lock of `owner`: of several that try, one does.

        Who creates the file of this takeover looks again, for another may have been through
        already; the lock is replaced, never absent, so that nobody else can slip in.
        """
        right = self._path.with_name(f".{LOCK_FILE}.takeover.{owner.token}")
        try:
            os.close(os.open(right, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o640))
        except FileExistsError:
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                if self._now_s() - right.stat().st_mtime > self._stale_s:
                    right.unlink()
            return False
        try:
            held = self._read()
            if held is None or held[0] != owner:
                return False
            self._draft().replace(self._path)
            return True
        finally:
            right.unlink()

    def _read(self) -> tuple[Owner, float] | None:
        """The holder and the seconds since its last sign; None if the lock is gone."""
        try:
            # One open file: by its name, the age could be of one lock and the owner of the next.
            with self._path.open() as file:
                changed_s = os.fstat(file.fileno()).st_mtime
                owner = Owner(**json.loads(file.read()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise LockedError(
                f"{self._path} is not a lock ({error}): remove it if no job runs in this folder"
            ) from error
        return owner, self._now_s() - changed_s

    def _now_s(self) -> float:
        """Unix time by the clock of the file server.

        Clocks of hosts differ, and jump: a file that is touched now tells the time there.
        """
        probe = self._path.with_name(f".{LOCK_FILE}.clock.{self._owner.token}")
        probe.touch()
        now_s = probe.stat().st_mtime
        probe.unlink()
        return now_s

    def _may_take(self, owner: Owner, age_s: float) -> bool:
        ours = self._owner
        if age_s > self._stale_s:
            return True
        if owner.pid_space == ours.pid_space and not _is_alive(owner.pid):
            return True
        # Slurm starts a job again only when its last attempt has ended.
        requeued = owner.job_id == ours.job_id and owner.attempt < ours.attempt
        return ours.job_id != "local" and requeued

    def _renew(self) -> None:
        while not self._over.wait(self._renew_s):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path)


def describe_lock(run_dir: Path) -> str:
    """Who holds the lock of a folder, and its last sign by this host's clock; "" if nobody."""
    path = run_dir / LOCK_FILE
    try:
        owner = Owner(**json.loads(path.read_text()))
        age_s = time.time() - path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return ""
    return f"{owner}, last sign {max(0.0, age_s):.0f} s ago"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _pid_space() -> str:
    """Names the set of processes that a process number is one of; unique where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex
