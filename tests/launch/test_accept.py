"""Acceptance on GPUs, as far as it can be shown without: pieces, and what is made of answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kinodit.launch.accept.pretended import forward
from kinodit.launch.accept.timed import NUM_WARM_STEPS, Spec, Timing, pack_of, time_steps
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import ROOT, Ranks

SPEC = Spec(
    "tiny",
    {"text": 5, "video": 13},
    segments=2,
    packs=2,
    parallel=ParallelConfig(dp_shard=1),
    remat=RematConfig("full"),
    num_steps=2,
)


@pytest.mark.parametrize(
    ("parallel", "exchanges", "is_split"),
    [
        (ParallelConfig(dp_shard=2), False, False),
        (ParallelConfig(dp_shard=1, cp=2), True, False),
        (ParallelConfig(dp_shard=1, cp=2, ring=2), False, False),
        (ParallelConfig(dp_shard=1, cp=4, ring=2, tp=2), True, True),
    ],
)
def test_a_rank_runs_on_a_pretended_device(
    parallel: ParallelConfig, exchanges: bool, is_split: bool
) -> None:
    model = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")).config.model
    spec = dataclasses.replace(SPEC, parallel=parallel)
    found = forward(model, parallel, pack_of(model, spec, range(2)), rank=1)
    (shape,) = found.shapes.values()
    shares = parallel.cp * parallel.tp
    assert 2 * 13 // shares <= shape[0] <= 2 * 13 // shares + 1
    assert (found.messages("alltoall") > 0) == exchanges
    assert (found.messages("allgather") > 0) == is_split
    assert found.ops.total() > 100


def test_a_pretended_kernel_refuses_what_a_real_one_does() -> None:
    model = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")).config.model
    odd = dataclasses.replace(
        model, head_dim=12, rope=dataclasses.replace(model.rope, axes=(0, 6, 6))
    )
    pack = pack_of(model, SPEC, range(2))
    # In one place another kernel takes it; in a ring there is none.
    forward(odd, ParallelConfig(dp_shard=2), pack)
    with pytest.raises(AssertionError, match="head dim of 12"):
        forward(odd, ParallelConfig(dp_shard=1, cp=2, ring=2), pack)


def test_a_spec_reads_back() -> None:
    assert Spec.of_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


def timed(rank: int, world_size: int, spec: Spec) -> Timing:
    return time_steps(spec, rank, world_size, torch.device("cpu"))


def test_steps_are_timed_without_the_first_ones() -> None:
    timing = timed(0, 1, SPEC)
    assert len(timing.steps_s) == SPEC.num_steps and min(timing.steps_s) > 0
    assert timing.step_s == pytest.approx(sum(timing.steps_s) / 2)
    assert timing.peak_bytes == 0 and NUM_WARM_STEPS > 0


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_time_the_layout_that_they_are_given() -> None:
    group = Ranks(2)
    try:
        spec = dataclasses.replace(SPEC, parallel=ParallelConfig(dp_shard=1, cp=2, ring=2))
        timings = group.run(timed, spec)
    finally:
        group.close()
    assert [len(one.steps_s) for one in timings] == [2, 2]


@pytest.fixture
def accept() -> Iterator[ModuleType]:
    """benchmarks/gpu_accept.py, which is a program."""
    path = ROOT / "benchmarks" / "gpu_accept.py"
    found = importlib.util.spec_from_file_location("gpu_accept", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["gpu_accept"] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules["gpu_accept"]


Answer = Callable[[list[str]], int]


class Node:
    """Answers in the place of commands that would need devices."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[list[str]] = []

    def run(self, command: list[str | Path], limit_s: float) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        self.asked.append(words)
        return subprocess.CompletedProcess(words, self._answer(words), "", "it broke")


def part_of(accept: ModuleType, name: str, answer: Answer, folder: Path) -> tuple[Any, Node]:
    part, node = accept.Part(), Node(answer)
    accept.PARTS[name](part, node, 8, folder)
    return part, node


def after(words: list[str], option: str) -> Path:
    return Path(words[words.index(option) + 1])


@pytest.mark.parametrize("ok", [True, False])
def test_a_certificate_on_devices_is_read(accept: ModuleType, ok: bool, tmp_path: Path) -> None:
    def answer(words: list[str]) -> int:
        rows = [
            {"layout": "tp=2", "noise_ratio": 0.9, "ok": True, "faults": []},
            {"layout": "cp=2", "noise_ratio": 7.0, "ok": ok, "faults": [] if ok else ["off"]},
        ]
        after(words, "--json").write_text(json.dumps(rows))
        return 0

    part, node = part_of(accept, "certificate", answer, tmp_path)
    assert [row["ok"] for row in part.rows] == [True, ok] * len(node.asked)
    assert all({"--device", "cuda", "--size", "full", "8"} <= set(words) for words in node.asked)
    assert part.rows[0]["value"] == 0.9


def test_a_command_that_breaks_is_a_row_with_its_words(
    accept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "device_kind", lambda part: ("H100", 79.1))
    for name in accept.PARTS:
        part, _ = part_of(accept, name, lambda words: 1, tmp_path)
        assert part.rows and not any(row["ok"] for row in part.rows)
        assert all("it broke" in row["why"] for row in part.rows)


@pytest.mark.parametrize(("failures", "skipped"), [(0, 2), (1, 0), (0, 9)])
def test_tests_that_fail_or_are_all_skipped_are_no_pass(
    accept: ModuleType, failures: int, skipped: int, tmp_path: Path
) -> None:
    def answer(words: list[str]) -> int:
        (report,) = [word for word in words if word.startswith("--junit-xml=")]
        case = '<testcase classname="tests.gpu" name="one">{}</testcase>'
        Path(report.partition("=")[2]).write_text(
            f'<testsuites><testsuite tests="9" failures="{failures}" errors="0" '
            f'skipped="{skipped}">{case.format("<failure/>" if failures else "")}'
            "</testsuite></testsuites>"
        )
        return int(failures > 0)

    part, node = part_of(accept, "tests", answer, tmp_path)
    (row,) = part.rows
    assert row["ok"] == (failures == 0 and skipped < 9)
    assert row["value"] == 9 - failures - skipped
    assert row["failed"] == ["tests.gpu.one"] * failures
    assert bool(part.notes) == bool(skipped)
    assert node.asked[0][-3:-1] == ["-m", "gpu"]


@pytest.mark.parametrize(("step_s", "peak", "expected"), [(2.2, 70, [1, 1]), (4.0, 90, [0, 0])])
def test_a_preset_is_held_to_its_plan(
    accept: ModuleType,
    step_s: float,
    peak: int,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accept, "device_kind", lambda part: ("H100", 79.1))
    degrees = {"dp_replicate": 1, "dp_shard": 4, "cp": 2, "ring": 1, "tp": 1}
    layout = {**degrees, "remat": "full", "step_s": 2.0, "memory_total": 80}
    step = {"tokens": {"text": 226, "video": 99}, "segments": 1, "packs": 8}

    def answer(words: list[str]) -> int:
        if "plan" in words:
            after(words, "--json").write_text(json.dumps({"layouts": [layout], "step": step}))
            return 0
        spec = Spec.of_json(json.loads(Path(words[-2]).read_text()))
        assert spec.parallel == ParallelConfig(dp_shard=4, cp=2) and spec.remat.mode == "full"
        assert "8" in words and spec.tokens == step["tokens"]
        found = Timing(step_s, (step_s,), peak)
        Path(words[-1]).write_text(json.dumps(dataclasses.asdict(found)))
        return 0

    part, _ = part_of(accept, "presets", answer, tmp_path)
    assert [row["ok"] for row in part.rows] == [bool(one) for one in expected * 3]
    assert [row["value"] for row in part.rows[:2]] == [step_s / 2.0, peak / 80]
    assert {row["planned_s"] for row in part.rows} == {2.0}
    presets = [str(row["name"]).split("/")[1] for row in part.rows[::2]]
    assert set(presets) <= set(PRESETS) and len(presets) == 3


def test_a_command_that_is_late_is_stopped(accept: ModuleType) -> None:
    clock = accept.Clock(minutes=1)
    done = clock.run([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=1)
    assert done.returncode == 124 and "stopped after 1 s" in done.stderr
    assert accept.Clock(minutes=0).run(["true"], 1).returncode == 124


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_device_it_runs_to_its_end_and_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    file = tmp_path / "accept.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_accept.py", "--json", file],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no CUDA device") and "nothing is measured" in done.stdout
    document = json.loads(file.read_text())
    assert document["measured"] is False and document["accepted"] is False
    assert document["ran"] is True and document["devices"] == []
    rows = [row for part in document["parts"].values() for row in part["rows"]]
    assert len(rows) > 60 and all("pretended" in row["name"] for row in rows)
    # The number of tests is counted; nothing that a device decides has a value.
    assert [row["name"] for row in rows if row["value"] is not None] == ["pretended tests"]


@pytest.mark.slow
def test_the_timed_program_runs_under_torchrun(tmp_path: Path) -> None:
    asked, found = tmp_path / "spec.json", tmp_path / "found.json"
    spec = dataclasses.replace(SPEC, parallel=ParallelConfig(dp_shard=2))
    asked.write_text(json.dumps(spec.to_json()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "kinodit.launch.accept.timed", str(asked), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text())["step_s"] > 0
