"""Jobs of a run: handing them to the scheduler, asking it about them, reading what they printed.

What a job leaves in the run's folder is written by its script (slurm/templates/): in `slurm/`,
`starts.ID` with a line for each start (unix time, step of the newest checkpoint), `output.ID` with
the path of the job's output, `refused.ID` with the error that ended it; and beside it the marker
`requeue.ID`, which the trainer writes.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kinodit.launch.slurm.quoting import SlurmError, option
from kinodit.trainer.resilience.signals import FINISHED_FILE, requeue_marker

NOTES = "slurm"
"""The folder within the run's, where scripts and notes of its jobs are."""

SCHEDULER_TIMEOUT_S = 60.0
POLL_S = 0.5
_OVER = frozenset(
    {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
    | {"DEADLINE", "gone"}
)


@dataclass(frozen=True)
class JobStatus:
    """One job of a run. `state` is Slurm's, or "gone" where Slurm no longer knows it."""

    job_id: int
    state: str
    reason: str
    restarts: str
    nodes: str
    num_starts: int
    note: str


def ask(*command: str) -> str:
    """What a command of Slurm's prints.

    Raises:
        SlurmError: there is no such command, it failed, or it did not answer in time.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SCHEDULER_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(f"no {command[0]} here: this machine submits no Slurm jobs") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} did not answer in {SCHEDULER_TIMEOUT_S:.0f} s: is the scheduler up?"
        ) from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SlurmError(f"{command[0]}: {said[-1]}")
    return done.stdout


def submit(script: Path, folder: Path, options: Sequence[str]) -> int:
    """Submit `script` with further `options` of sbatch; the job's number.

    Raises:
        SlurmError: an option has not the form of one, or sbatch refuses.
    """
    words = [option(text) for text in options]
    said = ask("sbatch", "--parsable", *words, str(script)).strip()
    job_id = said.partition(";")[0]
    if not job_id.isdecimal():
        raise SlurmError(f"sbatch answered {said!r} instead of a job's number")
    output = _facts(int(job_id)).get("StdOut", "")
    (folder / NOTES / f"output.{job_id}").write_text(output + "\n")
    return int(job_id)


def status(folder: Path) -> list[JobStatus]:
    """The jobs of a run, oldest first.

    Raises:
        SlurmError: it never had any, or Slurm does not answer.
    """
    return [_status(folder, job_id) for job_id in _job_ids(folder)]


def status_table(folder: Path) -> str:
    """`status` for a reader, below what the run has saved."""
    step = newest_step(folder)
    saved = "no checkpoint yet" if step is None else f"saved at step {step}"
    finished = ", finished" if (folder / FINISHED_FILE).exists() else ""
    head = ("job", "state", "restarts", "starts", "nodes", "")
    rows = [head] + [
        (
            str(job.job_id),
            job.state + (f" ({job.reason})" if job.reason else ""),
            job.restarts,
            str(job.num_starts),
            job.nodes,
            job.note,
        )
        for job in status(folder)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([f"{folder}: {saved}{finished}", *lines])


def log_lines(folder: Path, num_lines: int, *, follow: bool) -> Iterator[str]:
    """The last lines that the newest job printed; with `follow`, then those that come, to its end.

    Raises:
        SlurmError: the run has no job, or its output is not there (yet).
    """
    job_id = _job_ids(folder)[-1]
    noted = folder / NOTES / f"output.{job_id}"
    path = Path(noted.read_text().strip() if noted.exists() else "")
    try:
        with path.open(errors="replace") as output:
            last = deque(output, maxlen=num_lines)
            yield from (line.rstrip("\n") for line in last)
            while follow:
                ended = _status(folder, job_id).state in _OVER
                for line in output:
                    yield line.rstrip("\n")
                if ended:
                    return
                time.sleep(POLL_S)
    except OSError as error:
        raise SlurmError(
            f"job {job_id} has printed nothing yet ({path}: {error.strerror})"
        ) from error


def newest_step(folder: Path) -> int | None:
    """The step of a run's newest checkpoint, by the names of the folders."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*") if path.is_dir()]
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
    return max(steps, default=None)


def _job_ids(folder: Path) -> list[int]:
    notes = [*(folder / NOTES).glob("starts.*"), *(folder / NOTES).glob("output.*")]
    ids = {int(suffix) for path in notes if (suffix := path.suffix[1:]).isdecimal()}
    if not ids:
        raise SlurmError(f"{folder} had no Slurm job: start one with kinodit slurm submit")
    return sorted(ids)


def _status(folder: Path, job_id: int) -> JobStatus:
    facts = _facts(job_id)
    starts = folder / NOTES / f"starts.{job_id}"
    refused = folder / NOTES / f"refused.{job_id}"
    note = ""
    if refused.exists():
        note = refused.read_text().strip()
    elif requeue_marker(folder, str(job_id)).exists():
        note = "saved, to be requeued"
    reason = facts.get("Reason", "None")
    return JobStatus(
        job_id=job_id,
        state=facts.get("JobState", "gone"),
        reason="" if reason == "None" else reason,
        restarts=facts.get("Restarts", ""),
        nodes=facts.get("NodeList", "").replace("(null)", ""),
        num_starts=len(starts.read_text().splitlines()) if starts.exists() else 0,
        note=note,
    )


def _facts(job_id: int) -> dict[str, str]:
    """What Slurm knows of a job, by name; nothing of one that it has forgotten."""
    try:
        shown = ask("scontrol", "--oneliner", "show", "job", str(job_id))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", shown))
