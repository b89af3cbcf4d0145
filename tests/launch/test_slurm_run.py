"""A rendered script, run by bash, with stand-ins for Slurm's commands on PATH: what it decides."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kinodit.launch.slurm.cluster import ClusterConfig
from kinodit.launch.slurm.render import Job, fill

COMMANDS = {
    # Options first, then the program; its process is the step.
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ >step.pid\nexec "$@"',
    "scontrol": (
        'case "$*" in\n'
        '*"show hostnames"*) printf "node7\\nnode8\\n" ;;\n'
        '*"show node"*) echo "NodeName=$4 NodeAddr=10.0.0.${4#node}" ;;\n'
        '*"show job"*) echo "JobId=41 JobState=${STATE:-RUNNING} ExcNodeList=${EXCLUDED:-(null)}'
        ' StdOut=/out" ;;\n'
        '*) echo "$*" >>scontrol.log ;;\n'
        "esac"
    ),
    "scancel": (
        'echo "$@" >>scancel.log\nsignal=${1#--signal=}\nkill -s "$signal" "$(cat step.pid)"'
    ),
    # Stands for Python: `python -m kinodit COMMAND ...`. A plan is a list of what each start does.
    "python": (
        "shift 2\n"
        "case $1 in\n"
        "slurm)\n"
        "    echo runs/t\n"
        "    [[ $PLAN != finished ]] || exit 3\n"
        "    [[ $PLAN != unread ]] || exit 2 ;;\n"
        "doctor)\n"
        "    for node in $FIT; do touch runs/t/slurm/passed.41/$node; done\n"
        '    [[ $FIT == "node7 node8" && $PLAN != apart ]] ;;\n'
        "train)\n"
        "    env >trainer.env\n"
        '    echo "$*" >>trained\n'
        "    start=$(wc -l <trained)\n"
        '    act=$(cut -d, -f"$start" <<<"$PLAN")\n'
        '    [[ $act != *save* ]] || mkdir -p "runs/t/checkpoints/step-0000000$start"\n'
        '    [[ $act != *partial* ]] || mkdir -p "runs/t/checkpoints/step-00000009.tmp-x"\n'
        "    [[ $act != *marker* ]] || touch runs/t/requeue.41\n"
        '    [[ $act != *refuse* ]] || echo "no such shard" >"$KINODIT_REFUSAL"\n'
        "    if [[ $act == *late* ]]; then\n"
        "        trap 'sleep 0.5; mkdir -p runs/t/checkpoints/step-00000008; "
        "touch runs/t/requeue.41; exit 0' USR1\n"
        "        trap 'exit 0' TERM\n"
        "        touch started\n"
        "        while :; do sleep 0.05; done\n"
        "    fi\n"
        "    [[ $act != *exit* ]] || exit ${act##*exit} ;;\n"
        "esac"
    ),
}


class Bench:
    """A folder with a rendered script and the stand-ins; `plan` tells the trainer what to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in COMMANDS.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{body}\n")
            path.chmod(0o755)
        cluster = ClusterConfig(
            python="bin/python",
            max_restarts=3,
            environment={"NCCL_DEBUG": "a b"},
            setup=["export FROM_SETUP=1"],
        )
        job = Job("train", "t", Path("configs/t.yaml"), ("a=b c",), "generic", 2, None)
        (folder / "train.sh").write_text(fill(job, cluster))

    def start(self, plan: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        env = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "PLAN": plan,
            "FIT": "node7 node8",
            **variables,
        }
        return subprocess.Popen(
            ["bash", self.folder / "train.sh", *words],
            env=env,
            text=True,
            stderr=subprocess.PIPE,
            cwd="/",
        )

    def run(self, plan: str, *words: str, **variables: str) -> tuple[int, str]:
        """Exit code and stderr."""
        script = self.start(plan, *words, **variables)
        _, said = script.communicate(timeout=60)
        return script.returncode, said

    def signalled(self, number: signal.Signals, **variables: str) -> tuple[int, str]:
        """Exit code and stderr of a script that gets a signal once training runs."""
        script = self.start("late", **variables)
        deadline = time.monotonic() + 60
        while not (self.folder / "started").exists():
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.01)
        script.send_signal(number)
        _, said = script.communicate(timeout=60)
        return script.returncode, said

    @property
    def asked(self) -> list[str]:
        """What scontrol was told to change."""
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def num_starts(self) -> int:
        trained = self.folder / "trained"
        return len(trained.read_text().splitlines()) if trained.exists() else 0


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


REQUEUE = ["requeue 41"]


def test_a_run_to_its_end(bench: Bench) -> None:
    code, said = bench.run("save")
    assert (code, bench.asked, bench.num_starts) == (0, [], 1)
    assert "starts on 2 x 4 from step -1" in said and "done at step 1" in said


def test_a_finished_run_is_not_started(bench: Bench) -> None:
    code, said = bench.run("finished")
    assert (code, bench.asked, bench.num_starts) == (0, [], 0)
    assert "runs/t is finished" in said


@pytest.mark.parametrize(
    ("words", "trained"),
    [
        ([], "train configs/t.yaml a=b c"),
        (["x=1", "y=2"], "train configs/t.yaml a=b c x=1 y=2"),
        (["configs/u.yaml"], "train configs/u.yaml a=b c"),
        (["configs/u.yaml", "x=$(id)"], "train configs/u.yaml a=b c x=$(id)"),
    ],
)
def test_arguments_are_a_recipe_and_changes(bench: Bench, words: list[str], trained: str) -> None:
    assert bench.run("save", *words)[0] == 0
    assert (bench.folder / "trained").read_text() == f"{trained}\n"


def test_processes_meet_at_the_first_node_on_a_port_of_this_start(bench: Bench) -> None:
    ports = set()
    for restarts in ("", "1", "2"):
        assert bench.run("save", **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))[0] == 0
        env = dict(
            line.split("=", 1)
            for line in (bench.folder / "trainer.env").read_text().splitlines()
            if "=" in line
        )
        assert env["MASTER_ADDR"] == "10.0.0.7"
        assert env["NCCL_DEBUG"] == "a b"
        assert env["FROM_SETUP"] == "1"
        assert 1024 <= int(env["MASTER_PORT"]) < 32768
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 3


def test_a_recipe_that_cannot_be_read_ends_the_job(bench: Bench) -> None:
    code, said = bench.run("unread")
    assert (code, bench.asked, bench.num_starts) == (2, [], 0)
    assert "the recipe cannot be read" in said


def test_a_marker_means_requeue_whatever_the_exit_code(bench: Bench) -> None:
    code, said = bench.run("save marker exit7")
    assert (code, bench.asked, bench.num_starts) == (0, REQUEUE, 1)
    assert "requeued: goes on from step 1" in said
    assert not (bench.folder / "runs/t/requeue.41").exists()


def test_the_signal_before_the_limit_is_passed_on_and_the_save_awaited(bench: Bench) -> None:
    code, said = bench.signalled(signal.SIGUSR1)
    assert (code, bench.asked) == (0, REQUEUE)
    assert "goes on from step 8" in said
    assert (bench.folder / "scancel.log").read_text() == "--signal=USR1 41\n"


def test_a_cancelled_job_stays_cancelled(bench: Bench) -> None:
    code, said = bench.signalled(signal.SIGTERM)
    assert (code, bench.asked) == (143, [])
    assert "told to stop" in said
    assert (bench.folder / "scancel.log").read_text() == "--signal=TERM 41\n"


def test_a_job_that_is_over_for_slurm_is_not_revived(bench: Bench) -> None:
    code, said = bench.run("save marker", STATE="COMPLETING")
    assert (code, bench.asked) == (1, [])
    assert "it was cancelled" in said


def test_a_crash_starts_again_in_place(bench: Bench) -> None:
    code, said = bench.run("save exit9,exit9,save")
    assert (code, bench.asked, bench.num_starts) == (0, [], 3)
    assert said.count("failed with exit code 9; starts again in place") == 2
    assert "done at step 3" in said


def test_crashes_without_progress_end_after_three_restarts(bench: Bench) -> None:
    code, said = bench.run("exit9,partial exit9,exit9,exit9,save")
    assert (code, bench.asked, bench.num_starts) == (9, [], 4)
    assert "4 starts in a row brought no new checkpoint" in said


def test_starts_without_progress_count_across_the_queue(bench: Bench) -> None:
    for attempt in range(4):
        code, said = bench.run("marker,marker,marker,marker", SLURM_RESTART_COUNT=str(attempt % 3))
    assert code == 1 and "brought no new checkpoint" in said
    assert bench.asked == REQUEUE * 3


def test_progress_starts_the_count_anew(bench: Bench) -> None:
    code, _ = bench.run("exit9,exit9,save exit9,exit9,exit9,save")
    assert (code, bench.num_starts) == (0, 6)


def test_the_number_of_restarts_is_limited(bench: Bench) -> None:
    code, said = bench.run("save marker", SLURM_RESTART_COUNT="3")
    assert (code, bench.asked) == (1, [])
    assert "restarted 3 times already" in said


def test_what_the_user_has_to_change_is_not_tried_again(bench: Bench) -> None:
    code, said = bench.run("refuse exit143")
    assert (code, bench.asked, bench.num_starts) == (143, [], 1)
    assert "not restarted: no such shard" in said


@pytest.mark.parametrize(("already", "left_out"), [("(null)", ""), ("node1,node3", ",node1,node3")])
def test_an_unfit_node_is_left_out(bench: Bench, already: str, left_out: str) -> None:
    code, said = bench.run("save", FIT="node7", EXCLUDED=already)
    assert (code, bench.num_starts) == (0, 0)
    assert bench.asked == [
        "requeuehold 41",
        f"update JobId=41 ExcNodeList=node8{left_out}",
        "release 41",
    ]
    assert "without node8" in said


@pytest.mark.parametrize(("plan", "fit"), [("save", ""), ("apart", "node7 node8")])
def test_what_is_not_a_matter_of_nodes_ends_the_job(bench: Bench, plan: str, fit: str) -> None:
    code, said = bench.run(plan, FIT=fit)
    assert (code, bench.asked, bench.num_starts) == (1, [], 0)
    assert "not restarted" in said
