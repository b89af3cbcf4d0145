"""The lab of `slurm/lab/lab.sh`, as long as a test module needs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.ranks import ROOT

LAB = ROOT / "slurm" / "lab" / "lab.sh"
NODE = ROOT / "slurm" / "lab" / "node.sh"
T = TypeVar("T")
PATIENCE_S = 240.0
"""How long anything may take: these tests wait for events, and a busy machine is slow."""


def _free_port(num_ports: int) -> int:
    """The first of `num_ports` ports in a row that nobody has, by the process's number."""
    for attempt in range(100):
        first = 10_000 + (os.getpid() * 31 + attempt * 977) % 20_000
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + num_ports):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for bound in sockets:
                bound.close()
    raise AssertionError("no free ports")


class SlurmLab:
    """A running cluster. It ends with `close`, or when this process ends, however that happens:
    the lab waits for the end of its standard input."""

    def __init__(self, num_nodes: int) -> None:
        if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip("no slurmctld: apt-get install slurm-wlm slurm-wlm-basic-plugins munge")
        port = _free_port(num_nodes + 1)
        hold = 'echo "$LAB"; exec cat >/dev/null'
        self._process = subprocess.Popen(
            [LAB, "--nodes", str(num_nodes), "--port", str(port), "bash", "-c", hold],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.folder = Path(self._process.stdout.readline().strip() or "/nonexistent")
        assert self.folder.is_dir(), "the lab did not start"
        # lo: the machine's own name may lead to an address that nothing listens on.
        self.environment = {
            **{name: value for name, value in os.environ.items() if "SLURM" not in name},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "LAB": str(self.folder),
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def close(self) -> None:
        """Ends every daemon and every job."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0

    def run(self, *command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` knows, by name."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job_id: str, states: Iterable[str]) -> dict[str, str]:
        """The job once it is in one of the states."""
        wanted = set(states)
        return self.until(
            lambda: (job := self.job(job_id)) and job["JobState"] in wanted and job,
            f"job {job_id} in {wanted}",
        )

    def until(self, found: Callable[[], T | bool], what: str) -> T:
        """The first truth that `found` returns."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if (value := found()) is not False and value:
                return value  # type: ignore[return-value]
            time.sleep(0.2)
        raise AssertionError(f"waited {PATIENCE_S:.0f} s for {what}; {self.run('squeue')}")

    def node(self, verb: str, name: str) -> None:
        """`start` a node, or `kill` it with everything that it runs."""
        self.run(NODE, verb, name)


def processes_of(folder: Path) -> list[str]:
    """Command lines of this machine's processes that belong to the lab in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command + environment:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found
