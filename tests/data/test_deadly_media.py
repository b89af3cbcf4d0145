"""A medium that hangs or crashes its decoder in C costs one sample, named, and nothing else."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig, QuarantineConfig
from kinodit.data.curate import LIMITS, curate
from kinodit.data.decode import DecodedSample
from kinodit.data.loader import Loader, StepData
from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef, plan
from kinodit.data.preview import preview
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.quarantine import Replacement, substitute
from kinodit.data.samples import longest_s
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from kinodit.data.validate import validate
from tests.data.clips import small_records, write_dataset
from tests.data.shards import picture, write_images
from tests.support.decoders import HARMS, struck

BAD, STEPS = 6, 2
KEY = f"s{BAD:04d}"
REASON = {
    "hold": "allows: its decoder hung and was killed",
    "release": "allows: its decoder hung and was killed",
    "snail": "allows: its decoder hung and was killed",
    "crash": "its decoder crashed, and did so again in a new process",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("deadly") / "clips", small_records(10))


def settings_of(dataset: Dataset, **changes: Any) -> DataConfig:
    settings = DataConfig(
        datasets={"clips": DatasetConfig(str(dataset.directory))},
        num_frames=4, fps=6.0, height=24, width=24, samples_per_step=10, packs_per_step=3,
        decode_limit_s=0.5, quarantine=QuarantineConfig(max_shard_share=1.0),
    )  # fmt: skip
    return replace(settings, **changes)


def load(dataset: Dataset, **changes: Any) -> list[StepData]:
    settled = changes.pop("settled", None)
    settings = settings_of(dataset, **changes)
    spec = plan_spec(settings, {"clips": dataset}, CostModel(20, 5, 0, 3), seed=11)
    with Loader(spec, {"clips": dataset}, settings, end_step=STEPS, settled=settled) as loader:
        return list(loader)


def by_place(steps: list[StepData]) -> dict[tuple[int, int], DecodedSample]:
    return {(data.step, x.ref.slot): x for data in steps for pack in data.packs for x in pack}


def replaced(steps: list[StepData]) -> dict[tuple[int, int], Replacement]:
    return {(item.step, item.slot): item for data in steps for item in data.replaced}


def same(one: DecodedSample, other: DecodedSample) -> bool:
    assert one.video is not None and other.video is not None
    is_same = torch.equal(one.video, other.video)
    return is_same and structs.replace(one, video=None) == structs.replace(other, video=None)


def is_bad(record: Any, *_: Any) -> bool:
    return bool(record.key == KEY)


@pytest.mark.parametrize("harm", HARMS)
def test_a_substitute_by_rule_takes_its_place_and_the_ledger_names_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    good = load(dataset, workers="threads")
    with struck(monkeypatch, "kinodit.data.worker.decode", is_bad, harm):
        steps = load(dataset)
        found = replaced(steps)
        # What the ledger has settled is not opened again.
        again = load(dataset, settled=found, decode_limit_s=60.0)
    spec = plan_spec(settings_of(dataset), {"clips": dataset}, CostModel(20, 5, 0, 3), seed=11)
    wanted = {
        (step, ref.slot): ref
        for step in range(STEPS)
        for pack in plan(spec, step).packs
        for ref in pack
        if ref.index == BAD
    }
    assert len(wanted) == STEPS and found.keys() == wanted.keys()
    shard, offset, _ = dataset.locate(BAD)
    for place, item in found.items():
        (fault,) = item.faults
        assert (fault.shard, fault.offset, fault.key) == (str(shard), offset, KEY)
        assert REASON[harm] in fault.reason
        ref: SampleRef = wanted[place]
        assert item.used == substitute(spec, dataset, place[0], ref, [BAD]).index
    assert replaced(again) == found
    before, after = by_place(good), by_place(steps)
    assert before.keys() == after.keys() == by_place(again).keys()
    for place, sample in by_place(again).items():
        assert same(sample, after[place])
        assert place in found or same(sample, before[place])


def test_processes_that_somebody_kills_change_nothing(dataset: Dataset) -> None:
    settings = settings_of(dataset, decode_limit_s=60.0, prefetch_steps=1)
    spec = plan_spec(settings, {"clips": dataset}, CostModel(20, 5, 0, 3), seed=11)
    good = Loader(spec, {"clips": dataset}, replace(settings, workers="threads"), end_step=12)
    with good, Loader(spec, {"clips": dataset}, settings, end_step=12) as struck_loader:
        for step, (mine, other) in enumerate(zip(struck_loader, good, strict=True)):
            before, after = by_place([other]), by_place([mine])
            assert before.keys() == after.keys() and not mine.replaced
            assert all(same(after[place], sample) for place, sample in before.items())
            # A sample that meets two kills counts as one that kills: its process gets time for it.
            for worker in struck_loader._samples.decoders.workers if step % 4 == 0 else ():
                if worker.pid is not None:
                    os.kill(worker.pid, signal.SIGKILL)
        assert sum(worker.num_started for worker in struck_loader._samples.decoders.workers) > 4


@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_the_copy_with_scores_leaves_it_out(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    hasty = replace(LIMITS, decode_limit_s=1.0)
    with struck(monkeypatch, "kinodit.data.curate.measure", is_bad, harm):
        report = curate(str(dataset.directory), tmp_path / "scored", limits=hasty)
    assert report.manifest.num_samples == len(dataset) - 1
    assert [name for name, _ in report.left_out] == [f"sample {BAD}"]
    assert REASON[harm] in report.left_out[0][1]


@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_a_preview_shows_it_with_the_reason(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    seen: list[tuple[int, int]] = []
    hasty = partial(DecodeConfig, decode_limit_s=0.5)
    monkeypatch.setattr("kinodit.data.preview.DecodeConfig", hasty)
    with struck(monkeypatch, "kinodit.data.worker.decode", is_bad, harm):
        shown = preview(dataset, tmp_path / "page.html", progress=lambda *now: seen.append(now))
    assert shown == 10 and seen == [(done, 10) for done in range(1, 11)]
    page = (tmp_path / "page.html").read_text()
    said = REASON[harm].removeprefix("allows: ")
    assert page.count(said) == 1 and page.index(KEY) < page.index(said)


@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_validation_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    write_images(tmp_path / "d")
    monkeypatch.setattr("kinodit.data.validate.ProbeWorker", partial(ProbeWorker, 0.5))

    def is_fifth(extension: str, data: bytes) -> bool:
        return data == picture(5)

    with struck(monkeypatch, "kinodit.data.probe_worker.probe", is_fifth, harm):
        report = validate(tmp_path / "d", decode=True)
    assert (report.num_samples, report.num_good) == (12, 11)
    (problem,) = report.problems
    assert (problem.key, problem.member) == ("image-005", "png")
    said = "its decoder crashed" if harm == "crash" else "its decoder hung and was killed"
    assert said in problem.found


def test_a_rank_that_loads_is_given_the_time_that_its_limits_allow(dataset: Dataset) -> None:
    local = settings_of(dataset, decode_limit_s=60.0)
    assert longest_s(local) == 8 * 65.0
    remote = replace(local, datasets={"clips": DatasetConfig("http://host/clips")})
    # Eight attempts of a minute, and pauses of 1/2, 1, 2, 4, 8, 16 and 30 seconds.
    assert longest_s(remote) == 8 * 65.0 + 8 * 60.0 + 61.5
