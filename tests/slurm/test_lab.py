"""The lab is a real cluster, one of several on the machine, and leaves nothing behind."""

from __future__ import annotations

import subprocess

import pytest

from tests.slurm.lab import LAB, SlurmLab, processes_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_nodes_run_steps_and_have_gpus(lab: SlurmLab) -> None:
    said = lab.run(
        "srun", "--nodes=3", "--gpus-per-node=2", "--ntasks-per-node=2",
        "bash", "-c", 'echo "$SLURMD_NODENAME $SLURM_LOCALID $SLURM_GPUS_ON_NODE"',
    )  # fmt: skip
    assert sorted(said.splitlines()) == [
        f"node{node} {task} 2" for node in (1, 2, 3) for task in (0, 1)
    ]


def test_a_killed_node_is_down_and_comes_back(lab: SlurmLab) -> None:
    job = lab.run(
        "sbatch", "--parsable", "--output=/dev/null", "--nodelist=node3", "--wrap", "sleep 1000"
    ).strip()
    lab.wait(job, ["RUNNING"])
    lab.node("kill", "node3")
    lab.until(
        lambda: "down" in lab.run("sinfo", "--noheader", "--nodes=node3", "--format=%T"), "down"
    )
    assert lab.job(job)["JobState"] != "RUNNING"
    lab.run("scancel", job)
    lab.node("start", "node3")
    lab.until(
        lambda: "idle" in lab.run("sinfo", "--noheader", "--nodes=node3", "--format=%T"), "idle"
    )


def test_a_second_lab_does_not_meet_the_first_and_goes_without_trace(lab: SlurmLab) -> None:
    other = SlurmLab(1)
    job = other.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 1000").strip()
    other.wait(job, ["RUNNING"])
    assert lab.run("squeue", "--noheader") == ""
    assert len(lab.run("sinfo", "--noheader", "--Node").splitlines()) == 3
    assert processes_of(other.folder)
    other.close()
    assert processes_of(other.folder) == []
    assert not other.folder.exists()


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--port", "80"], ["--what", "x"]])
def test_arguments_that_do_not_fit_are_refused(arguments: list[str]) -> None:
    done = subprocess.run([LAB, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr
