"""Training on a real Slurm, by the committed script: every event of docs/slurm.md."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.lab import SlurmLab
from tests.support.ranks import ROOT
from tests.support.recipes import tiny_recipe, write_dataset
from tests.support.sampling import sampled

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 60
Curve = dict[int, tuple[float, float]]


class Runs:
    """Runs of one small recipe in one lab."""

    def __init__(self, lab: SlurmLab, root: Path) -> None:
        self.lab, self.root = lab, root
        self.recipe = tiny_recipe(
            root,
            write_dataset(root),
            run={"out_dir": str(root / "runs"), "steps": STEPS},
            checkpoint={"every_steps": 10},
        )

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def submit(
        self, name: str, *changes: str, options: tuple[str, ...] = (), faults: str = ""
    ) -> str:
        """The committed script, as its head says to submit it: 2 nodes x 1 GPU."""
        return self.lab.run(
            "sbatch", "--parsable", "--nodes=2", "--partition=main", "--gpus-per-node=1",
            f"--output={self.root}/%j.out", *options, "slurm/train_t2v.sh",
            self.recipe, f"run.name={name}", *changes, KINODIT_FAULTS=faults,
        ).strip()  # fmt: skip

    def said(self, job: str) -> str:
        path = self.root / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def rows(self, name: str) -> list[dict[str, float]]:
        path = self.folder(name) / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
        return [row for row in rows if row["kind"] == "train"]

    def curve(self, name: str) -> Curve:
        return {int(row["step"]): (row["loss"], row["grad_norm"]) for row in self.rows(name)}

    def reach(self, name: str, job: str, step: int) -> None:
        """Wait until a run has logged a step."""
        self.lab.until(
            lambda: any(row["step"] >= step for row in self.rows(name)),
            f"step {step} of {name}: {self.said(job)[-2000:]}",
        )

    def finish(self, job: str) -> None:
        """Wait for a good end."""
        state = self.lab.wait(job, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"])
        assert state["JobState"] == "COMPLETED", self.said(job)


@pytest.fixture(scope="module")
def runs(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(lab, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Curve:
    """The loss curve of a run that nothing interrupts."""
    job = runs.submit("undisturbed")
    runs.finish(job)
    said = runs.said(job)
    assert "kinodit doctor: 2 node(s), 2 rank(s): " in said
    assert "starts on 2 x 1 from step -1" in said and f"done at step {STEPS}" in said
    curve = runs.curve("undisturbed")
    assert list(curve) == list(range(1, STEPS + 1))
    return curve


def test_signal_by_hand_saves_requeues_and_keeps_the_curve(runs: Runs, undisturbed: Curve) -> None:
    job = runs.submit("signalled")
    runs.reach("signalled", job, 2)
    runs.lab.run("scancel", "--signal=USR1", job)
    runs.finish(job)
    said = runs.said(job)
    assert "requeued: goes on from step" in said
    assert runs.lab.job(job)["Restarts"] == "1"
    assert runs.curve("signalled") == undisturbed
    assert not list(runs.folder("signalled").glob("requeue.*"))


def test_signal_to_the_batch_shell_as_before_the_limit(runs: Runs, undisturbed: Curve) -> None:
    job = runs.submit("warned")
    runs.reach("warned", job, 2)
    runs.lab.run("scancel", "--batch", "--signal=USR1", job)
    runs.finish(job)
    assert "requeued: goes on from step" in runs.said(job)
    assert runs.curve("warned") == undisturbed


def test_time_limits_are_met_with_a_save(runs: Runs, undisturbed: Curve, size: str) -> None:
    """One minute, which is the least that Slurm knows, for a run that takes longer.

    Warned by Slurm, and without a word of it: then a signal that means nothing is asked for, and
    the run goes by the time that it was told it has.
    """
    # Every start takes twenty steps at once, and the next ones slowly.
    slowly = "sleep:point=step:begin,after=20,seconds=1.5,times=1000"
    # Each takes more than a minute: one of them, or both in full size.
    every = [("limited", "B:USR1@20"), ("unwarned", "B:CONT@1")]
    warnings = dict(sampled(every, 1, size, "time limits"))
    jobs = {
        name: runs.submit(name, options=("--time=1", f"--signal={warning}"), faults=slowly)
        for name, warning in warnings.items()
    }
    for name, job in jobs.items():
        runs.finish(job)
        assert int(runs.lab.job(job)["Restarts"]) >= 1
        assert "requeued: goes on from step" in runs.said(job)
        assert runs.curve(name) == undisturbed


def test_a_cancelled_run_stays_cancelled_and_can_go_on(runs: Runs, undisturbed: Curve) -> None:
    job = runs.submit("cancelled")
    runs.reach("cancelled", job, 2)
    runs.lab.run("scancel", job)
    runs.lab.until(lambda: runs.lab.job(job)["JobState"] == "CANCELLED", "the end")
    time.sleep(8)
    assert runs.lab.job(job)["JobState"] == "CANCELLED"
    assert runs.lab.job(job)["Restarts"] == "0"
    runs.finish(runs.submit("cancelled"))
    assert runs.curve("cancelled") == undisturbed


def test_a_killed_rank_starts_again_in_place(runs: Runs, undisturbed: Curve) -> None:
    job = runs.submit("killed")
    runs.reach("killed", job, 15)
    subprocess.run(["kill", "-KILL", str(rank_of("run.name=killed"))], check=True)
    runs.finish(job)
    assert "starts again in place" in runs.said(job)
    assert runs.lab.job(job)["Restarts"] == "0"
    assert runs.curve("killed") == undisturbed


def rank_of(word: str) -> int:
    """A training process that has `word` among its arguments."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:4] == ["-m", "kinodit", "train"] and word in words:
            return int(entry.name)
    raise AssertionError(f"no process trains with {word}")


def test_a_dead_node_is_left_and_the_run_goes_on_elsewhere(runs: Runs, undisturbed: Curve) -> None:
    submitted_s = time.monotonic()
    job = runs.submit("dead")
    runs.reach("dead", job, 15)
    start_s = time.monotonic() - submitted_s
    nodes = runs.lab.run("scontrol", "show", "hostnames", runs.lab.job(job)["NodeList"]).split()
    killed_s = time.monotonic()
    runs.lab.node("kill", nodes[1])
    runs.lab.until(lambda: runs.said(job).count("starts on 2 x 1") == 2, "another start")
    runs.lab.until(
        lambda: "resume" in (runs.folder("dead") / "events.jsonl").read_text(), "the resumed run"
    )
    resumed_s = time.monotonic() - killed_s
    print(f"submit -> step 15: {start_s:.1f} s; node killed -> resumed: {resumed_s:.1f} s")
    runs.finish(job)
    assert nodes[1] not in runs.lab.run(
        "scontrol", "show", "hostnames", runs.lab.job(job)["NodeList"]
    )
    assert runs.curve("dead") == undisturbed
    # Of the 60 s, 15 are for the processes' own start on an idle machine; here it may take longer.
    assert resumed_s - start_s < 45
    runs.lab.node("start", nodes[1])
    runs.lab.until(
        lambda: "idle" in runs.lab.run("sinfo", "--noheader", f"--nodes={nodes[1]}", "--format=%T"),
        "the node",
    )


def test_a_crash_loop_ends_after_three_restarts(runs: Runs, tmp_path: Path) -> None:
    """Python dies at once in training, as with a broken library."""
    site = tmp_path / "sitecustomize.py"
    site.write_text("import os, sys\nif 'train' in sys.orig_argv: os.abort()\n")
    job = runs.lab.run(
        "sbatch", "--parsable", "--nodes=1", "--gpus-per-node=1",
        f"--output={runs.root}/%j.out", "slurm/train_t2v.sh", runs.recipe, "run.name=looping",
        PYTHONPATH=str(tmp_path),
    ).strip()  # fmt: skip
    state = runs.lab.wait(job, ["COMPLETED", "FAILED", "CANCELLED"])
    said = runs.said(job)
    assert state["JobState"] == "FAILED"
    assert said.count("starts on 1 x 1") == 4, said
    assert "not restarted: 4 starts in a row brought no new checkpoint" in said


def test_what_the_user_has_to_change_is_not_tried_again(runs: Runs) -> None:
    job = runs.submit("refused", "data.datasets.clips.path=/nowhere")
    state = runs.lab.wait(job, ["COMPLETED", "FAILED", "CANCELLED"])
    assert state["JobState"] == "FAILED"
    said = runs.said(job)
    assert said.count("starts on") == 1 and "not restarted:" in said and "/nowhere" in said


def test_array_and_dependent_jobs_check_a_dataset(runs: Runs) -> None:
    def checked(dataset: Path) -> dict[str, str]:
        array = runs.lab.run(
            "sbatch", "--parsable", "--array=0-2", f"--output={runs.root}/%A_%a.out",
            "slurm/validate.sh", dataset,
        ).strip()  # fmt: skip
        verdict = runs.lab.run(
            "sbatch", "--parsable", f"--dependency=afterany:{array}",
            f"--output={runs.root}/%j.out", "slurm/validate_summary.sh", dataset, array,
        ).strip()  # fmt: skip
        state = runs.lab.wait(verdict, ["COMPLETED", "FAILED", "CANCELLED"])
        return {**state, "said": runs.said(verdict)}

    good = checked(runs.root / "data")
    assert good["JobState"] == "COMPLETED", good["said"]
    assert "12 of 12 samples are good; no problems" in good["said"]
    copy = runs.root / "damaged"
    subprocess.run(["cp", "-r", runs.root / "data", copy], check=True)
    (shard, *_) = sorted(copy.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    bad = checked(copy)
    assert bad["JobState"] == "FAILED"
    assert shard.name in bad["said"]


def test_submit_status_and_logs(runs: Runs) -> None:
    def kinodit(*words: str) -> str:
        return runs.lab.run(ROOT / ".venv" / "bin" / "python", "-m", "kinodit", "slurm", *words)

    folder = str(runs.folder("by-hand"))
    said = kinodit(
        "submit", str(runs.recipe), "run.name=by-hand", "--cluster", "cpu", "--nodes", "1",
        f"--sbatch=--output={runs.root}/%j.out",
    )  # fmt: skip
    job = said.split()[1].rstrip(":")
    runs.finish(job)
    shown = kinodit("status", folder)
    assert f"saved at step {STEPS}, finished" in shown
    assert job in shown and "COMPLETED" in shown
    assert f"done at step {STEPS}" in kinodit("logs", folder, "--lines", "1")


@pytest.mark.parametrize("launcher", ["torchrun"])
def test_other_launchers_train_and_come_back(
    launcher: str, runs: Runs, undisturbed: Curve, tmp_path: Path
) -> None:
    cluster = tmp_path / "mine.yaml"
    cluster.write_text(f"launcher: {launcher}\ngpus_per_node: 0\ncpus_per_process: 1\nmemory: ''\n")
    script = tmp_path / "train.sh"
    words = ["render", str(runs.recipe), "--cluster", str(cluster), "--out", str(script)]
    runs.lab.run(ROOT / ".venv" / "bin" / "python", "-m", "kinodit", "slurm", *words)
    job = runs.lab.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={runs.root}/%j.out", script,
        f"run.name={launcher}", PET_LOCAL_ADDR="127.0.0.1",
    ).strip()  # fmt: skip
    runs.reach(launcher, job, 2)
    runs.lab.run("scancel", "--signal=USR1", job)
    runs.finish(job)
    assert "requeued: goes on from step" in runs.said(job)
    assert runs.curve(launcher) == undisturbed


def test_no_secret_is_left_by_a_job(runs: Runs) -> None:
    job = runs.lab.run(
        "sbatch", "--parsable", "--nodes=1", "--gpus-per-node=1",
        f"--output={runs.root}/%j.out", "slurm/train_t2v.sh", runs.recipe, "run.name=secretive",
        "run.steps=1", WANDB_API_KEY="canary-0123456789",
    ).strip()  # fmt: skip
    runs.finish(job)
    files = [*runs.root.glob("*.out"), *runs.folder("secretive").rglob("*")]
    read = [path.read_bytes() for path in files if path.is_file()]
    assert len(read) > 5
    assert not [data for data in read if b"canary" in data]
    assert b"canary" not in json.dumps(runs.lab.job(job)).encode()


def test_an_array_encodes_a_dataset(runs: Runs) -> None:
    cache = runs.root / "encoded"
    array = runs.lab.run(
        "sbatch", "--parsable", "--array=0-1", "--partition=main", "--gpus=0",
        f"--output={runs.root}/%A_%a.out", "slurm/encode.sh", runs.recipe, cache,
    ).strip()  # fmt: skip
    runs.lab.until((cache / "cache.json").exists, f"a cache of array {array}")
