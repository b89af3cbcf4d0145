"""Media that hang or crash their decoder in C: runs go on, by their default, and so do commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kinodit.data.container import DecodeError
from kinodit.data.decode import decode
from kinodit.data.manifest import Dataset
from kinodit.data.quarantine import LEDGER_FILE
from kinodit.launch.cli import main
from kinodit.trainer.resilience.errors import HUNG
from tests.data.shards import picture, write_tar
from tests.support.decoders import struck
from tests.support.recipes import tiny_recipe, write_dataset

KEY = "clip05"
pytestmark = pytest.mark.slow
ALLOWED = ("data.quarantine.max_shard_share=1", "data.decode_limit_s=0.6")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deadly")
    write_dataset(made)
    return made


def is_bad(record: Any, *_: Any) -> bool:
    return bool(record.key == KEY)


def rows(root: Path, name: str, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "runs" / name / file).read_text().splitlines()]


def trained(root: Path, name: str, *overrides: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    recipe = tiny_recipe(root, root / "data")
    assert main(["train", str(recipe), f"run.name={name}", *ALLOWED, *overrides]) == 0
    found = rows(root, name, "metrics.jsonl")
    return [(row["loss"], row["grad_norm"]) for row in found if row["kind"] == "train"]


@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_the_curve_is_that_of_a_sample_that_is_merely_damaged(
    root: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    with struck(monkeypatch, "kinodit.data.worker.decode", is_bad, harm):
        curve = trained(root, harm)

    def refused(record: Any, *rest: Any) -> Any:
        if record.key == KEY:
            raise DecodeError("damaged", record.key)
        return decode(record, *rest)

    monkeypatch.setattr("kinodit.data.decoders.decode", refused)
    assert trained(root, f"plain-{harm}", "data.workers=threads") == curve and len(curve) == 6
    found, plain = rows(root, harm, LEDGER_FILE), rows(root, f"plain-{harm}", LEDGER_FILE)
    dataset = Dataset(root / "data")
    (index,) = {row["wanted"] for row in found}
    shard, offset, _ = dataset.locate(index)
    reason = "crashed, and did so again" if harm == "crash" else "hung and was killed"
    for row in found:
        (fault,) = row["faults"]
        assert (fault["shard"], fault["offset"], fault["key"]) == (str(shard), offset, KEY)
        assert reason in fault["reason"]
        fault["reason"] = "damaged"
    assert found == plain


@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_a_cache_leaves_it_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    with struck(monkeypatch, "kinodit.data.worker.decode", is_bad, harm):
        recipe = tiny_recipe(root, root / "data")
        assert main(["data", "encode", str(recipe), str(root / f"cache-{harm}"), *ALLOWED]) == 0
    said = capsys.readouterr()
    assert "11 samples encoded" in said.out and "1 samples left out" in said.out
    assert KEY in said.err


SITE = """
import builtins, sys

def strikes(record, *rest):
    if record.key == {key!r}:
        from tests.support.decoders import HARMS
        HARMS[{harm!r}]()
    return decode(record, *rest)

def imported(*args, **options):
    global decode
    module = real(*args, **options)
    here = sys.modules.get("kinodit.data.worker")
    if decode is None and hasattr(here, "DecodeWorker"):
        decode = here.decode
        here.decode = strikes
        if decoders := sys.modules.get("kinodit.data.decoders"):
            decoders.decode = strikes
    return module

decode, real = None, builtins.__import__
builtins.__import__ = imported
"""
"""Makes every process of a command harm itself, from the first line of Python on."""


@pytest.mark.parametrize(
    ("workers", "harm", "code"),
    [("processes", "hold", 0), ("threads", "crash", 139), ("threads", "hold", HUNG)],
)
def test_the_command_under_its_watchdog(
    root: Path, tmp_path: Path, workers: str, harm: str, code: int
) -> None:
    """It waits longer for data than a rank may be silent in a step, and is not ended for it."""
    (tmp_path / "sitecustomize.py").write_text(SITE.format(key=KEY, harm=harm))
    name = f"real-{workers}-{harm}"
    recipe = tiny_recipe(root, root / "data")
    command = [
        sys.executable, "-m", "kinodit", "train", str(recipe), f"run.name={name}", *ALLOWED,
        "resilience.hang_s=2", f"data.workers={workers}",
    ]  # fmt: skip
    if code == HUNG:
        # Its first sample is read in its first step, which may take that long.
        command.append("run.deadline_s=30")
        trained(root, "before", "run.steps=1")
        (root / "runs" / name).mkdir()
        shutil.copy(root / "runs" / "before" / "codec.json", root / "runs" / name)
    where = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    variables = {**os.environ, "PYTHONPATH": where}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    if workers == "processes":
        assert {row["wanted"] for row in rows(root, name, LEDGER_FILE)} == {5}
        assert rows(root, name, "metrics.jsonl")[-1]["step"] == 6
    else:
        said = f"sample {KEY!r} (clips:5 in 000000.tar) for "
        assert said in rows(root, name, "events.jsonl")[-1]["message"] and said in done.stderr


PROBE_SITE = """
import builtins, sys

def strikes(extension, data):
    if data == {medium!r}:
        from tests.support.decoders import crash
        crash()
    return probe(extension, data)

def imported(*args, **options):
    global probe
    module = real(*args, **options)
    here = sys.modules.get("kinodit.data.probe_worker")
    if probe is None and hasattr(here, "ProbeWorker"):
        probe = here.probe
        here.probe = strikes
    return module

probe, real = None, builtins.__import__
builtins.__import__ = imported
"""


def run_with_deadly(medium: bytes, where: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that `medium` crashes wherever it is opened."""
    (where / "sitecustomize.py").write_text(PROBE_SITE.format(medium=medium))
    command = [sys.executable, "-m", "kinodit", *arguments]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(where), str(Path.cwd())])}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stderr


def test_an_index_by_several_processes_names_it_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        # Long enough for two processes.
        members = {f"{shard}{n}.png": picture(4 * shard + n) for n in range(4)}
        members[f"{shard}0.png"] += bytes(40 << 20)
        write_tar(folder / f"{shard}.tar", members)
    index = ["data", "index", str(folder), "--workers", "2"]
    code, said = run_with_deadly(picture(6), tmp_path, *index)
    reason = "sample '12': its decoder crashed, and did so again in a new process"
    assert code == 2 and said.splitlines()[-1].endswith(f"{folder / '1.tar'}: {reason}")
    code, said = run_with_deadly(picture(6), tmp_path, *index, "--skip-bad")
    assert code == 0 and "left out: 1.tar: sample '12' at byte" in said and reason in said
    assert len(Dataset(folder)) == 7


def test_a_pack_names_it_and_goes_on(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(3):
        (media / f"{number}.png").write_bytes(picture(number))
    packed = str(tmp_path / "packed")
    pack = ["data", "pack", str(media), packed, "--allow-uncaptioned"]
    reason = "1.png: its decoder crashed, and did so again in a new process"
    code, said = run_with_deadly(picture(1), tmp_path, *pack)
    assert code == 2 and said.splitlines()[-1].strip() == reason
    code, said = run_with_deadly(picture(1), tmp_path, *pack, "--skip-bad")
    assert code == 0 and f"left out: {reason}" in said and len(Dataset(packed)) == 2


def test_a_file_that_sampling_is_given_is_an_error_of_the_user(root: Path, tmp_path: Path) -> None:
    trained(root, "sampled", "run.steps=1", "checkpoint.every_steps=1")
    file = tmp_path / "deadly.png"
    file.write_bytes(picture(5))
    sample = ["sample", str(root / "runs" / "sampled"), "--prompt", "x", "--given", str(file)]
    code, said = run_with_deadly(picture(5), tmp_path, *sample)
    reason = f"{file}: its decoder crashed, and did so again in a new process"
    assert code == 2 and said.splitlines()[-1].endswith(reason), said
