"""A parent process for each rank: finds it hung, has every rank's stacks written, and ends it.

The rank is a fork, made before torch is loaded; its parent only reads the page of
`trainer/resilience/pulse.py`. So nothing that happens to the rank keeps it from being found: not a
stop signal, not a collective that never returns, not C code that holds the interpreter's lock.
A rank that waits for a hung one is silent as well, so all parents find the hang at about the same
time and write reports into one folder; who had begun the fewest messages, is stopped, or sends no
report at all is the one that hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kinodit.trainer.events import EventKind, append_event
from kinodit.trainer.resilience import pulse
from kinodit.trainer.resilience.errors import HUNG

POLL_S = 0.2
GATHER_S = 0.8
"""How long other watchdogs have to hold their ranks."""
DOUBT_S = 4.0
"""Silence after which a watchdog looks for hangs that others have found, until a sign comes."""
DUMP_S = 0.8
"""How long a rank has to write its stacks; a hang is over GATHER_S + this after it was found."""
STILL = 6
"""Looks, .05 s apart, over which a file of stacks that does not grow is taken to be whole."""
NUM_SUMMARISERS = 8
"""Only the lowest of so many ranks reads all reports: thousands would ask the same of the disk."""
_PR_SET_PDEATHSIG = 1
_FORWARDED = {signal.SIGUSR1, signal.SIGTERM}


@dataclass(frozen=True)
class Report:
    """What a watchdog writes.

    silent_s: since the last sign, which was good for limit_s; stopped: by a signal or a debugger
    decoding: samples that threads were decoding (data.workers=threads), since when and in which
    """

    rank: int
    world_size: int
    host: str
    silent_s: float
    limit_s: float
    stopped: bool
    step: int
    activity: str
    collective: str
    num_messages: int
    decoding: Sequence[str] = ()


def supervise() -> int | None:
    """`fork_watched`, but None without a fork where torch is loaded: threads do not survive one."""
    return None if "torch" in sys.modules else fork_watched()


def fork_watched() -> int | None:
    """Fork. Returns None in the child, which goes on, and its exit code in the parent."""
    page, stacks = pulse.Page(), os.memfd_create("stacks")
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
        faulthandler.enable(stacks, all_threads=True)
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
        pulse.adopt(page)
        return None
    return Watchdog(page, child, stacks).watch()


class Watchdog:
    """Watches the process `child`, which writes to `page`, and its stacks to the file `stacks`."""

    def __init__(self, page: pulse.Page, child: int, stacks: int) -> None:
        self._page, self._child, self._stacks = page, child, stacks

    def watch(self) -> int:
        """Wait for the end of the child, or bring it about; the exit code."""
        # Taken one by one below, instead of by handlers. A terminal sends INT to the child, too.
        waited_for = {signal.SIGCHLD, *_FORWARDED}
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
        looked_s = time.monotonic()
        awake_since_s = looked_s
        while True:
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if ended:
                return self._ended(os.waitstatus_to_exitcode(status))
            received = signal.sigtimedwait(waited_for, POLL_S)
            if received is not None and received.si_signo in _FORWARDED:
                os.kill(self._child, received.si_signo)
            now_s = time.monotonic()
            if now_s - looked_s > POLL_S + 1.0:
                # The whole job was suspended, or the machine was: start counting again.
                awake_since_s = now_s
            looked_s = now_s
            sign = self._page.read()
            silent_s = now_s - max(sign.time_s, awake_since_s)
            if silent_s > sign.limit_s or self._hangs_elsewhere(silent_s, sign):
                return self._hung(sign, silent_s)

    def _hangs_elsewhere(self, silent_s: float, sign: pulse.Sign) -> bool:
        """Whether another watchdog, whose rank may have had less time, has found a hang.

        Asked only when in doubt: disks are shared.
        """
        if silent_s < min(DOUBT_S, sign.limit_s / 2):
            return False
        folder = self._page.who().folder
        return bool(folder) and Path(folder).is_dir()

    def _ended(self, code: int) -> int:
        """What the child ended with; a signal as the shell would say it."""
        who, sign = self._page.who(), self._page.read()
        if code >= 0:
            # Its connection broke as a hung rank was ended.
            in_a_hang = code and who.folder and any(Path(who.folder).glob("rank-*.json"))
            return HUNG if in_a_hang else code
        number = -code
        if number not in (signal.SIGTERM, signal.SIGINT) and who.folder:
            message = (
                f"rank {who.rank} was ended by {signal.Signals(number).name} "
                f"in step {sign.step} ({sign.activity})"
            )
            decoding = self._decoding()
            if decoding:
                message += f"; it decoded {'; '.join(decoding)}"
            text = self._stack_text()
            if text:
                message += f"; its stacks: {self._write_stacks(who, text)}"
            self._say(who, "crash", sign.step, message)
        return 128 + number

    def _hung(self, sign: pulse.Sign, silent_s: float) -> int:
        """Write this rank's report, sum up all reports, end the rank."""
        who = self._page.who()
        stopped = _is_stopped(self._child)
        # All are held before any is made to write its stacks: one that goes on, and be it for a
        # signal, sets free who waits for it, and their stacks would be of somewhere else.
        os.kill(self._child, signal.SIGSTOP)
        # A full disk must not keep the rank alive.
        if who.folder:
            with contextlib.suppress(OSError):
                self._report(who, sign, silent_s, stopped)
            time.sleep(GATHER_S)
        self._take_stacks()
        if who.folder:
            with contextlib.suppress(OSError):
                self._write_stacks(who, self._stack_text())
                self._sum_up(who, sign.step)
        else:
            sys.stderr.write(f"a process did not join the run within {silent_s:.0f} s\n")
            sys.stderr.write(self._stack_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        return HUNG

    def _take_stacks(self) -> None:
        """Have the child, which is held, write its stacks; hold it again."""
        # A stopped process handles a pending signal first when it goes on.
        for number in (signal.SIGUSR2, signal.SIGCONT):
            os.kill(self._child, number)
        self._await_stacks()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGSTOP)

    def _decoding(self) -> list[str]:
        """What threads of the child are at, the one that has been for longest first."""
        now_s = time.monotonic()
        return [note.told(now_s) for note in self._page.at_work.read()]

    def _report(self, who: pulse.Watched, sign: pulse.Sign, silent_s: float, stopped: bool) -> None:
        report = Report(
            who.rank,
            who.world_size,
            socket.gethostname(),
            round(silent_s, 2),
            round(sign.limit_s, 2),
            stopped,
            sign.step,
            sign.activity,
            sign.collective,
            sign.num_messages,
            self._decoding(),
        )
        _write(Path(who.folder) / f"rank-{who.rank:05d}.json", json.dumps(asdict(report)))

    def _sum_up(self, who: pulse.Watched, step: int) -> None:
        if who.rank >= NUM_SUMMARISERS:
            return
        folder = Path(who.folder)
        reports = read_reports(folder)
        if min(report.rank for report in reports) == who.rank:
            message = f"{summary(reports)}; stacks of {len(reports)} rank(s) in {folder}"
            _write(folder / "summary.txt", message + "\n")
            self._say(who, "hang", step, message)

    def _say(self, who: pulse.Watched, kind: EventKind, step: int, message: str) -> None:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        if who.rank == 0:
            # Its child, which writes the run's events, is held or gone.
            append_event(Path(who.folder).parents[1], kind, step, message)

    def _await_stacks(self) -> None:
        """Until the child has written them, or for `DUMP_S`."""
        end_s, sizes = time.monotonic() + DUMP_S, [0]
        while time.monotonic() < end_s:
            time.sleep(0.05)
            sizes.append(os.fstat(self._stacks).st_size)
            # On a busy machine a rank may not get on for a while in the middle of a thread.
            if sizes[-1] > 0 and len(set(sizes[-STILL:])) == 1:
                return

    def _stack_text(self) -> str:
        size = os.fstat(self._stacks).st_size
        return os.pread(self._stacks, size, 0).decode(errors="replace")

    def _write_stacks(self, who: pulse.Watched, text: str) -> Path:
        path = Path(who.folder) / f"rank-{who.rank:05d}.txt"
        notes = "".join(f"decoding {line}\n" for line in self._decoding())
        _write(path, notes + (text or "no stacks: the process did not answer\n"))
        return path


def read_reports(folder: Path) -> list[Report]:
    """The reports in a folder, by rank."""
    paths = sorted(folder.glob("rank-*.json"))
    return [Report(**json.loads(path.read_text())) for path in paths]


def odd_ranks(reports: Sequence[Report]) -> list[int]:
    """Who the others wait for: who sent no report, else is stopped, else is behind; else all."""
    present = {report.rank for report in reports}
    missing = [rank for rank in range(reports[0].world_size) if rank not in present]
    if missing:
        return missing
    stopped = [report.rank for report in reports if report.stopped]
    if stopped:
        return stopped
    first = min((report.step, report.num_messages) for report in reports)
    return [report.rank for report in reports if (report.step, report.num_messages) == first]


def summary(reports: Sequence[Report]) -> str:
    """One sentence: which rank hangs, in which step, and after which message."""
    odd = odd_ranks(reports)
    by_rank = {report.rank: report for report in reports}
    names = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
    known = by_rank.get(odd[0])
    if known is None:
        other = reports[0]
        return (
            f"{names} of {other.world_size} hang{'s' if len(odd) == 1 else ''} or lost the disk: "
            f"no report; rank {other.rank} waits in step {other.step} ({other.activity}), "
            f"message {other.num_messages}, {other.collective}"
        )
    what = "was stopped by a signal" if known.stopped else "hangs"
    last = f"message {known.num_messages}, {known.collective}" if known.num_messages else "start"
    text = (
        f"{names} of {known.world_size} {what}: no sign for {known.silent_s:.1f} s "
        f"in step {known.step} ({known.activity}), after {last}"
    )
    if known.decoding:
        text += f"; it decodes {'; '.join(known.decoding)}"
    waiting = next((report for report in reports if report.rank not in odd), None)
    if waiting is not None and waiting.num_messages:
        text += f"; the others wait in message {waiting.num_messages}, {waiting.collective}"
    return text


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped; its state stands behind its name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    """Write a file whole: others may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
