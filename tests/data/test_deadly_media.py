"""A medium that hangs or crashes its decoder in C costs one sample, named, and nothing else."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kinodit.data.config import DataConfig, DatasetConfig, DecodeConfig, QuarantineConfig
from kinodit.data.curate import LIMITS, curate
from kinodit.data.decode import DecodedSample
from kinodit.data.given import GivenError, read_given, read_references
from kinodit.data.index import ManifestError
from kinodit.data.indexing import IndexOptions, index_shards
from kinodit.data.loader import Loader, StepData
from kinodit.data.manifest import Dataset
from kinodit.data.pack import PackError, pack
from kinodit.data.plan import SampleRef, plan
from kinodit.data.preview import preview
from kinodit.data.probe import MediumError, probe
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.quarantine import Replacement, substitute
from kinodit.data.remux import remux
from kinodit.data.samples import longest_s
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from kinodit.data.validate import validate
from tests.data.clips import clip_bytes, small_records, write_dataset
from tests.data.shards import picture, write_images, write_tar
from tests.support.decoders import HARMS, struck

BAD, STEPS = 6, 2
KEY = f"s{BAD:04d}"
REASON = {
    "hold": "allows: its decoder hung and was killed",
    "release": "allows: its decoder hung and was killed",
    "snail": "allows: its decoder hung and was killed",
    "crash": "its decoder crashed, and did so again in a new process",
}
SAID = {
    "hold": "opening it takes longer than 0.5 s: its decoder hung and was killed",
    "crash": REASON["crash"],
}
"""Of a medium that is opened to learn what it is."""


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
    return is_same and replace(one, video=None) == replace(other, video=None)


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


def write_pictures(folder: Path) -> None:
    """Two shards of another tool, which says no sizes: three pictures each."""
    folder.mkdir()
    for shard in range(2):
        numbers = range(3 * shard, 3 * shard + 3)
        members = [
            (f"p{n}.{name}", data) for n in numbers for name, data in
            (("png", picture(n)), ("txt", b"a colour"))
        ]  # fmt: skip
        write_tar(folder / f"{shard}.tar", members)


def is_fourth(extension: str, data: bytes) -> bool:
    return data == picture(4)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_an_index_leaves_it_out_or_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, skip_bad: bool
) -> None:
    folder = tmp_path / "d"
    write_pictures(folder)
    monkeypatch.setattr("kinodit.data.indexing.ProbeWorker", partial(ProbeWorker, 0.5))
    options = IndexOptions(skip_bad=skip_bad)
    with struck(monkeypatch, "kinodit.data.probe_worker.probe", is_fourth, harm):
        if not skip_bad:
            with pytest.raises(ManifestError) as error:
                index_shards(folder, "d", options)
            assert str(error.value) == f"{folder / '1.tar'}: sample 'p4': {SAID[harm]}"
            return
        report = index_shards(folder, "d", options)
    ((shard, damage),) = report.left_out
    assert (shard, damage.key, damage.offset) == ("1.tar", "p4", 2048)
    assert damage.reason == f"sample 'p4': {SAID[harm]}"
    dataset = Dataset(folder)
    assert [dataset.row(n).width for n in range(len(dataset))] == [16] * 5


@pytest.mark.parametrize("bad", ["picture", "reference", "other container"])
@pytest.mark.parametrize(("harm", "skip_bad"), [("hold", True), ("crash", True), ("crash", False)])
def test_a_pack_has_it_among_the_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, skip_bad: bool, bad: str
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(3):
        (media / f"p{number}.png").write_bytes(picture(number))
    (media / "p2.ref0.png").write_bytes(picture(4 if bad == "reference" else 3))
    name, where = "p2.png", "p2.png: p2.ref0.png" if bad == "reference" else "p2.png"
    if bad == "picture":
        (media / name).write_bytes(picture(4))
    if bad == "other container":
        (media / "p2.png").unlink()
        name = where = "p2.mkv"
        (media / name).write_bytes(picture(4))
    target = "remux" if bad == "other container" else "probe"
    monkeypatch.setattr("kinodit.data.pack.ProbeWorker", partial(ProbeWorker, 0.5))

    def is_bad(*args: str | bytes) -> bool:
        return picture(4) in args

    with struck(monkeypatch, f"kinodit.data.probe_worker.{target}", is_bad, harm):
        if not skip_bad:
            with pytest.raises(PackError, match="1 of 3 media cannot be packed; nothing") as error:
                pack(media, tmp_path / "d", allow_uncaptioned=True)
            assert str(error.value).endswith(f"\n  {where}: {SAID[harm]}")
            assert not (tmp_path / "d").exists()
            return
        report = pack(media, tmp_path / "d", skip_bad=True, allow_uncaptioned=True)
    assert report.bad == (f"{where}: {SAID[harm]}",)
    assert report.manifest.num_samples == 2


@pytest.mark.parametrize("at", ["probe_worker.probe", "probe_worker.remux", "worker.decode"])
@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_a_file_that_a_task_is_given_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, at: str
) -> None:
    path = tmp_path / "given.mov"
    path.write_bytes(clip_bytes(8, 12))
    monkeypatch.setattr("kinodit.data.given.ProbeWorker", partial(ProbeWorker, 0.5))
    config = DecodeConfig(height=16, width=16, num_frames=1, decode_limit_s=0.5, max_references=1)
    deadly = struck(monkeypatch, f"kinodit.data.{at}", lambda *_: True, harm)
    with deadly, pytest.raises(GivenError) as error:
        if harm == "hold":
            read_given(path, config)
        else:
            read_references([path], config)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    assert SAID[harm].rpartition(": ")[2] in said
    assert read_given(path, config).video is not None


def test_copying_streams_elsewhere_gives_the_same_bytes() -> None:
    clip = clip_bytes(8, 12, onset=2000)
    with closing(ProbeWorker()) as worker:
        assert worker.remux(clip, "mov") == remux(clip, "mov")
        with pytest.raises(MediumError, match="its streams cannot be copied into an mp4"):
            worker.remux(b"garbage" * 99, "avi")
        assert worker.probe("mp4", clip) == probe("mp4", clip)
