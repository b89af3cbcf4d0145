"""A rendered script, run by bash, with stand-ins for Slurm's commands on PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kinodit.launch.slurm import ClusterConfig, Job, fill

COMMANDS = {
    # Options first, then the program; its process is the step.
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ >step.pid\nexec "$@"',
    "scontrol": (
        'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "$@" >>scontrol.log; fi'
    ),
    "scancel": (
        'echo "$@" >>scancel.log\nsignal=${1#--signal=}\nkill -s "$signal" "$(cat step.pid)"'
    ),
    "trainer": (
        "env >trainer.env\n"
        'mkdir -p "runs/t/checkpoints/step-00000010.tmp-x"\n'
        "[[ $PLAN != *save* ]] || mkdir -p runs/t/checkpoints/step-00000010\n"
        "if [[ $PLAN == late ]]; then\n"
        "    trap 'sleep 0.5; mkdir runs/t/checkpoints/step-00000020; exit 7' USR1\n"
        "    touch started\n"
        "    while :; do sleep 0.05; done\n"
        "fi\n"
        "touch started\n"
        "[[ $PLAN != *exit* ]] || exit ${PLAN##*exit}\n"
        # The process itself must get the signal, and sleep must not outlive it.
        "exec sleep 30"
    ),
}


class Lab:
    """A folder with a rendered script and the stand-ins; `plan` tells the trainer what to do."""

    def __init__(self, folder: Path, max_restarts: int = 3) -> None:
        self.folder = folder
        for name, body in COMMANDS.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{body}\n")
            path.chmod(0o755)
        cluster = ClusterConfig(
            python="bin/trainer",
            max_restarts=max_restarts,
            environment={"NCCL_DEBUG": "a b"},
            setup=["export FROM_SETUP=1"],
        )
        job = Job("t", Path("runs/t"), Path("configs/t.yaml"), (), "generic", 2, None)
        (folder / "train.sh").write_text(fill(job, cluster))

    def start(self, plan: str, restarts: int | None = None) -> subprocess.Popen[str]:
        env = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "PLAN": plan,
        }
        if restarts is not None:
            env["SLURM_RESTART_COUNT"] = str(restarts)
        return subprocess.Popen(
            ["bash", self.folder / "train.sh"], env=env, text=True, stderr=subprocess.PIPE, cwd="/"
        )

    def signalled(
        self, plan: str, number: signal.Signals, restarts: int | None = None
    ) -> tuple[int, str]:
        """Exit code and stderr of a script that gets a signal once its step runs."""
        script = self.start(plan, restarts)
        deadline = time.monotonic() + 20
        while not (self.folder / "started").exists():
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.01)
        script.send_signal(number)
        _, said = script.communicate(timeout=20)
        return script.returncode, said

    @property
    def requeued(self) -> bool:
        log = self.folder / "scontrol.log"
        return log.exists() and log.read_text() == "requeue 41\n"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_of_the_step_is_the_job_s(lab: Lab, code: int) -> None:
    script = lab.start(f"save exit{code}")
    script.communicate(timeout=20)
    assert script.returncode == code
    assert not lab.requeued


def test_processes_meet_at_the_first_node_on_a_port_of_this_attempt(lab: Lab) -> None:
    ports = set()
    for restarts in (None, 1, 2):
        lab.start("exit0", restarts).communicate(timeout=20)
        env = dict(
            line.split("=", 1)
            for line in (lab.folder / "trainer.env").read_text().splitlines()
            if "=" in line
        )
        assert env["MASTER_ADDR"] == "node7"
        assert env["NCCL_DEBUG"] == "a b"
        assert env["FROM_SETUP"] == "1"
        assert 1024 <= int(env["MASTER_PORT"]) < 32768
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 3


def test_out_of_time_after_a_checkpoint_goes_back_to_the_queue(lab: Lab) -> None:
    code, said = lab.signalled("save", signal.SIGUSR1)
    assert lab.requeued
    assert "runs/t/checkpoints/step-00000010" in said
    assert ".tmp" not in said
    assert code == 128 + signal.SIGUSR1
    assert (lab.folder / "scancel.log").read_text() == "--signal=USR1 41.0\n"


def test_a_step_that_saves_on_the_signal_is_waited_for(lab: Lab) -> None:
    code, said = lab.signalled("late", signal.SIGUSR1)
    assert code == 7
    assert lab.requeued
    assert "step-00000020" in said


def test_out_of_time_without_a_checkpoint_does_not_loop(lab: Lab) -> None:
    code, said = lab.signalled("", signal.SIGUSR1)
    assert not lab.requeued
    assert "not requeued: no checkpoint" in said
    assert code != 0


def test_the_number_of_restarts_is_limited(lab: Lab) -> None:
    _, said = lab.signalled("save", signal.SIGUSR1, restarts=3)
    assert not lab.requeued
    assert "restarted 3 times already" in said


def test_a_cancelled_job_stays_cancelled(lab: Lab) -> None:
    code, _ = lab.signalled("save", signal.SIGTERM)
    assert not lab.requeued
    assert code == 128 + signal.SIGTERM
    assert (lab.folder / "scancel.log").read_text() == "--signal=TERM 41.0\n"
