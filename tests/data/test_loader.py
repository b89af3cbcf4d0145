"""What a rank is given depends on plan and data: not on ranks, threads, caches or restarts."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from kinodit.data import loader as loading
from kinodit.data.at_work import AtWork
from kinodit.data.captions import choose_caption
from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedSample, decode, pick_view
from kinodit.data.loader import Loader, LoadError, StepData
from kinodit.data.manifest import Dataset
from kinodit.data.record import Caption, Record
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel, PlanSpec
from kinodit.models.random import sample_generator, uniform
from kinodit.models.tokens import SampleKey
from tests.data.clips import small_records, write_dataset


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """Two datasets of short clips and images."""
    root = tmp_path_factory.mktemp("loader")
    return {
        "many": write_dataset(root / "many", small_records(23)),
        "few": write_dataset(root / "few", small_records(5)),
    }


def config(datasets: dict[str, Dataset], **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {
        "datasets": {
            "many": DatasetConfig(str(datasets["many"].directory), weight=0.75),
            "few": DatasetConfig(str(datasets["few"].directory), weight=0.25),
        },
        "num_frames": 4,
        "fps": 6.0,
        "height": 24,
        "width": 24,
        "crop": "random",
        "samples_per_step": 7,
        "packs_per_step": 3,
    }
    return DataConfig(**fields | changes)


def spec_of(datasets: dict[str, Dataset], settings: DataConfig) -> PlanSpec:
    return plan_spec(settings, datasets, CostModel(20, 5, 0, 3), seed=11)


def run(
    datasets: dict[str, Dataset],
    steps: int = 6,
    start: int = 0,
    rank: int = 0,
    size: int = 1,
    **changes: Any,
) -> list[StepData]:
    settings = config(datasets, **changes)
    spec = spec_of(datasets, settings)
    with Loader(spec, datasets, settings, rank, size, start, start + steps) as loader:
        return list(loader)


def assert_same(one: DecodedSample, other: DecodedSample) -> None:
    assert one.video is not None and other.video is not None
    assert torch.equal(one.video, other.video)
    assert structs.replace(one, video=None) == structs.replace(other, video=None)


def by_slot(steps: list[StepData]) -> dict[tuple[int, int], DecodedSample]:
    return {
        (data.step, sample.ref.slot): sample
        for data in steps
        for pack in data.packs
        for sample in pack
    }


@pytest.fixture(scope="module")
def expected(datasets: dict[str, Dataset]) -> dict[tuple[int, int], DecodedSample]:
    """Six steps of one rank with one thread."""
    return by_slot(run(datasets, num_threads=1, prefetch_steps=1))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_ranks_and_threads_change_nothing(
    datasets: dict[str, Dataset],
    expected: dict[tuple[int, int], DecodedSample],
    size: int,
    threads: int,
) -> None:
    ranks = [
        run(datasets, rank=rank, size=size, num_threads=threads, prefetch_steps=3)
        for rank in range(size)
    ]
    assert {len(data.packs) for steps in ranks for data in steps} == {-(-3 // size)}
    found = [by_slot(steps) for steps in ranks]
    merged = {key: sample for part in found for key, sample in part.items()}
    assert sum(map(len, found)) == len(merged) == len(expected) == 42
    for key, sample in merged.items():
        assert_same(sample, expected[key])


def test_packs_are_the_same_packs_on_any_number_of_ranks(datasets: dict[str, Dataset]) -> None:
    def packs(steps: list[StepData], step: int) -> list[tuple[int, ...]]:
        return [tuple(s.ref.slot for s in pack) for pack in steps[step].packs]

    alone = run(datasets)
    for step in range(6):
        dealt = [packs(run(datasets, rank=rank, size=2), step) for rank in range(2)]
        assert [dealt[0][0], dealt[1][0], dealt[0][1]] == packs(alone, step)
        assert dealt[1][1] == ()


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_restart_goes_on_where_it_stopped(
    datasets: dict[str, Dataset], expected: dict[tuple[int, int], DecodedSample], start: int
) -> None:
    resumed = by_slot(run(datasets, steps=6 - start, start=start))
    assert set(resumed) == {key for key in expected if key[0] >= start}
    for key, sample in resumed.items():
        assert_same(sample, expected[key])


def test_a_cache_changes_nothing_and_is_used(
    datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def counting(record: Any, *rest: Any) -> Any:
        decoded.append(record.key)
        return decode(record, *rest)

    monkeypatch.setattr("kinodit.data.decoders.decode", counting)
    options: dict[str, Any] = {"window": "first", "crop": "centre", "num_threads": 1}
    options["workers"] = "threads"
    plain = by_slot(run(datasets, steps=12, **options))
    without = len(decoded)
    decoded.clear()
    cached = by_slot(run(datasets, steps=12, cache_mib=64, **options))
    assert without == 84 and len(decoded) == 23 + 5
    for key, sample in cached.items():
        assert_same(sample, plain[key])
    decoded.clear()
    # Windows and crops that differ from the held ones are decoded anew, not served.
    drawn, drawn_cached = by_slot(run(datasets)), by_slot(run(datasets, cache_mib=64))
    for key, sample in drawn_cached.items():
        assert_same(sample, drawn[key])


def test_samples_carry_their_names_and_their_own_draws(
    datasets: dict[str, Dataset], expected: dict[tuple[int, int], DecodedSample]
) -> None:
    settings = config(datasets)
    assert len({sample.view.first for sample in expected.values()}) > 3
    assert len({sample.view.crop for sample in expected.values()}) == 42
    for (step, slot), sample in expected.items():
        assert sample.key == SampleKey(step, slot, sample.ref.sample_id)
        window = uniform(sample_generator(11, sample.key, "window"))
        crop = sample_generator(11, sample.key, "crop")
        place = uniform(crop), uniform(crop)
        assert sample.view == pick_view(sample.meta, settings, window, place)
        captions = sample.meta.captions
        assert sample.caption == choose_caption(captions, 11, sample.key)
        assert sample.caption in {caption.text for caption in captions}


def test_captions_are_drawn_by_weight_and_key() -> None:
    captions = (Caption("a", weight=1), Caption("never", weight=0), Caption("b", weight=3))
    keys = [SampleKey(step, slot, "clips:1") for step in range(40) for slot in range(50)]
    drawn = [choose_caption(captions, 0, key) for key in keys]
    assert drawn == [choose_caption(captions, 0, key) for key in keys]
    # Four standard errors of a binomial share of 3/4 among 2000.
    assert abs(drawn.count("b") / 2000 - 0.75) < 0.039 and "never" not in drawn
    assert choose_caption((), 0, keys[0]) == ""
    alike = [choose_caption((Caption("x", weight=0), Caption("y", weight=0)), 0, k) for k in keys]
    assert abs(alike.count("x") / 2000 - 0.5) < 0.045


def test_prefetching_is_bounded_and_stops(datasets: dict[str, Dataset]) -> None:
    settings = config(datasets, prefetch_steps=2)
    loader = Loader(spec_of(datasets, settings), datasets, settings)
    next(loader)
    assert loader._next_step == 3
    next(loader)
    assert loader._next_step == 4
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]
    with pytest.raises(StopIteration):
        next(loader)


def test_waiting_is_measured(datasets: dict[str, Dataset]) -> None:
    steps = run(datasets, steps=2)
    assert all(data.wait_s >= 0 for data in steps)
    assert steps[0].wait_s > 0


@pytest.mark.parametrize("limit_s", [60.0, 0.0])
def test_signs_of_life_are_given_while_limits_allow_waiting(
    datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    """Or until some process is stopped, which has nobody to give them."""
    monkeypatch.setattr(loading, "ALIVE_EVERY_S", 0.01)
    monkeypatch.setattr(loading, "longest_s", lambda config: limit_s)
    settings = config(datasets, workers="threads")
    go_on, signs = threading.Event(), []

    def slow(*args: Any, **options: Any) -> Any:
        assert go_on.wait(60)
        return decode(*args, **options)

    def alive() -> None:
        signs.append(1)
        if len(signs) == 3:
            go_on.set()

    monkeypatch.setattr("kinodit.data.decoders.decode", slow)
    if limit_s == 0:
        threading.Timer(0.1, go_on.set).start()
    with Loader(spec_of(datasets, settings), datasets, settings, alive=alive) as loader:
        assert next(loader).step == 0
    assert bool(signs) == (limit_s > 0)


def test_what_a_thread_has_been_at_for_too_long_is_told_once(
    datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "ALIVE_EVERY_S", 0.01)
    monkeypatch.setattr("kinodit.data.decoders.GRACE_S", 0.0)
    settings = config(datasets, workers="threads", decode_limit_s=1.0)
    notes, struck = AtWork(), list[str]()

    def hangs(record: Record, *rest: Any) -> Any:
        if not struck:
            struck.append(record.key)
            end_s = time.monotonic() + 60
            while not caplog.records and time.monotonic() < end_s:
                time.sleep(0.01)
            assert notes.read()[0].what.startswith(f"sample {record.key!r} (")
            # In which it is looked at again.
            time.sleep(0.1)
            raise DecodeError("damaged", record.key)
        return decode(record, *rest)

    monkeypatch.setattr("kinodit.data.decoders.decode", hangs)
    with Loader(spec_of(datasets, settings), datasets, settings, at_work=notes) as loader:
        next(loader)
    (warning,) = caplog.records
    said = warning.getMessage()
    assert said.startswith(f"decoding sample {struck[0]!r} (")
    assert " in 000000.tar) for 1." in said and "data.decode_limit_s allows 1 s" in said
    assert notes.read() == []


def copied(datasets: dict[str, Dataset], root: Path) -> dict[str, Dataset]:
    few = write_dataset(root / "few", small_records(5))
    return {"many": datasets["many"], "few": few}


def test_a_broken_clip_ends_the_run_with_its_name(
    datasets: dict[str, Dataset], tmp_path: Path
) -> None:
    records = small_records(5)
    records[2] = structs.replace(records[2], members={"mp4": b"garbage" * 100})
    broken = {"many": datasets["many"], "few": write_dataset(tmp_path / "few", records)}
    settings = config(broken, on_error="fail")
    with Loader(spec_of(broken, settings), broken, settings) as loader:
        with pytest.raises(LoadError) as error:
            for _ in range(20):
                next(loader)
        shard = broken["few"].locate(2)[0]
        for part in ("sample 's0002', member 'mp4'", "few:2", str(shard), "step", "slot"):
            assert part in str(error.value)
        with pytest.raises(StopIteration):
            next(loader)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.mark.parametrize("harm", ["missing", "truncated", "damaged"])
def test_a_shard_that_goes_bad_ends_the_run_with_its_name(
    datasets: dict[str, Dataset], tmp_path: Path, harm: str
) -> None:
    bad = copied(datasets, tmp_path)
    settings = config(bad, on_error="fail")
    loader = Loader(spec_of(bad, settings), bad, settings)
    path, offset, _ = bad["few"].locate(0)
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        os.truncate(path, offset + 512)
    else:
        data = bytearray(path.read_bytes())
        data[offset + 700] ^= 1
        path.write_bytes(data)
    message = {"missing": "No such file", "truncated": "cut off", "damaged": "CRC-32"}[harm]
    with pytest.raises(LoadError, match=message) as error:
        for _ in range(20):
            next(loader)
    assert str(path) in str(error.value)


def test_a_fault_of_ours_is_not_hidden(
    datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("kinodit.data.decoders.decode", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        run(datasets, workers="threads")
