"""Ranks that train on the same packs decode and hold each sample once on a node."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import decode
from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset
from kinodit.data.media import write_mp4
from kinodit.data.record import Record
from kinodit.data.select import open_datasets, plan_spec
from kinodit.data.shared_media import DecodedRecord, SharedMedia, shared_folder
from kinodit.data.spec import CostModel
from kinodit.models.random import generator
from tests.data.clips import clip_bytes, video_record, write_dataset

PARTS = ("video", "audio")


@pytest.fixture(scope="module")
def record() -> Record:
    return video_record("clip", clip_bytes(24, 12, onset=400), 24, 12.0, has_audio=True)


def decoded(record: Record, **options: Any) -> DecodedRecord:
    settings = {"height": 32, "width": 48, "num_frames": 6, "fps": 6.0, "use_audio": True}
    config = DataConfig(**settings, **options)  # type: ignore[arg-type]
    return DecodedRecord(record.meta, decode(record, config, 0.3))


def equal(one: DecodedRecord, other: DecodedRecord) -> bool:
    mine, theirs = one.media, other.media
    planes = (
        [(mine.planes.y, theirs.planes.y), (mine.planes.uv, theirs.planes.uv)]
        if mine.planes is not None and theirs.planes is not None
        else []
    )
    pairs = [(getattr(mine, name), getattr(theirs, name)) for name in PARTS] + planes
    tensors = all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in pairs
    )
    rest = [replace(part, video=None, audio=None, planes=None) for part in (mine, theirs)]
    kinds = [part.planes and (part.planes.matrix, part.planes.is_full) for part in (mine, theirs)]
    return tensors and rest[0] == rest[1] and kinds[0] == kinds[1] and one.meta == other.meta


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_what_another_rank_has_decoded_is_the_same(
    tmp_path: Path, record: Record, pixels: str
) -> None:
    one, other = SharedMedia(tmp_path / "s"), SharedMedia(tmp_path / "s")
    own, calls = decoded(record, pixels=pixels), list[int]()

    def make() -> DecodedRecord:
        calls.append(1)
        return decoded(record, pixels=pixels)

    first, second = (shared.sample(3, ("k", 1.5), make) for shared in (one, other))
    assert len(calls) == 1
    assert equal(first, own) and equal(second, own)
    picture = second.media.video if pixels == "rgb" else second.media.planes
    assert picture is not None
    # Whoever writes to it has a copy of its own.
    assert second.media.audio is not None and first.media.audio is not None
    second.media.audio.add_(1)
    assert equal(first, own)
    one.sample(3, ("k", 1.25), make)
    assert len(calls) == 2, "another key is another sample"
    other.forget(4)
    assert equal(first, own), "what is mapped stays"
    one.sample(3, ("k", 1.5), make)
    assert len(calls) == 3
    one.close()
    assert not (tmp_path / "s").exists()
    assert equal(other.sample(5, "k", make), own), "without the folder each decodes for itself"


def test_one_decodes_while_the_others_wait(tmp_path: Path, record: Record) -> None:
    own, calls = decoded(record), list[int]()

    def make() -> DecodedRecord:
        calls.append(1)
        threading.Event().wait(0.1)
        return own

    shared = [SharedMedia(tmp_path / "s") for _ in range(6)]
    threads = [threading.Thread(target=part.sample, args=(0, "k", make)) for part in shared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_sample_that_cannot_be_decoded_fails_on_every_rank(tmp_path: Path) -> None:
    def make() -> DecodedRecord:
        raise DecodeError("damaged")

    for _ in range(2):
        with pytest.raises(DecodeError, match="damaged"):
            SharedMedia(tmp_path / "s").sample(0, "k", make)


def test_no_room_and_strange_folders_cost_speed_only(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = decoded(record)
    (tmp_path / "file").write_text("not a folder")
    assert SharedMedia(tmp_path / "file").sample(0, "k", lambda: own) is own

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kinodit.data.shared_media._write", full)
    assert SharedMedia(tmp_path / "s").sample(0, "k", lambda: own) is own
    assert shared_folder("a", 1) == shared_folder("a", 1) != shared_folder("a", 2)


def big_clips(folder: Path) -> Dataset:
    records = []
    for number in range(32):
        shade = generator("shade", number).integers(0, 255, (1, 9, 16, 3), dtype=np.uint8)
        video = np.repeat(np.kron(shade, np.ones((1, 8, 8, 1), np.uint8)), 24, 0)
        write_mp4(folder / "clip.mp4", video, 12)
        data = (folder / "clip.mp4").read_bytes()
        records.append(video_record(f"c{number:03d}", data, 24, 12.0, width=128, height=72))
    return write_dataset(folder / "clips", records)


def settings(directory: Path, **options: Any) -> DataConfig:
    return DataConfig(
        datasets={"clips": DatasetConfig(str(directory))},
        height=288, width=512, num_frames=16, fps=8.0, samples_per_step=8, packs_per_step=4,
        num_threads=2, **options,
    )  # fmt: skip


def hold(link: Connection, directory: Path, dp: tuple[int, int], folder: str) -> None:
    """A rank: loads some steps, and stays until it has been measured."""
    torch.set_num_threads(1)
    config = settings(directory)
    datasets = open_datasets(config)
    spec = plan_spec(config, datasets, CostModel(20, 5, 0, 3), seed=3)
    gc.collect()
    link.send(pss_bytes())
    link.recv()
    shared = SharedMedia(Path(folder)) if folder else None
    loader = Loader(spec, datasets, config, *dp, end_step=8, shared=shared)
    for _ in range(4):
        now = next(loader)
    # Steps ahead are loaded, too, before anything is measured.
    for step in loader._ahead:
        step.loaded()
    link.send(0)
    link.recv()
    gc.collect()
    link.send(pss_bytes())
    link.recv()
    assert now.step == 3
    loader.close()


def pss_bytes(pid: int | str = "self") -> int:
    """The part of the memory that a process has with those that it started.

    Shared pages are divided among those who map them.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    children = {
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    }
    return own + sum(map(pss_bytes, children))


def node_bytes(directory: Path, ranks: list[tuple[int, int]], folder: str) -> int:
    """What the loaders of these (dp_index, dp_size) add to the memory of a node."""
    context = multiprocessing.get_context("spawn")
    links, processes = [], []
    for dp in ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(theirs, directory, dp, folder))
        process.start()
        theirs.close()
        links.append(ours)
        processes.append(process)

    def ask() -> int:
        found: int = sum(link.recv() for link in links)
        for link in links:
            link.send(None)
        return found

    before = ask()
    ask()
    after = ask()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return after - before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_of_a_node_does_not_depend_on_tp_and_cp(tmp_path: Path) -> None:
    """Four ranks on a node: data parallel, or two by two, or all on the same packs."""
    directory = big_clips(tmp_path).directory
    apart = node_bytes(directory, [(n, 4) for n in range(4)], "")
    for group in (2, 4):
        ranks = [(n // group, 4 // group) for n in range(4)]
        # One folder, though pairs share no sample: names are of contents.
        together = node_bytes(directory, ranks, str(shared_folder(tmp_path, group)))
        assert together < 1.3 * apart, f"{apart >> 20} MiB became {together >> 20} MiB"
        alone = node_bytes(directory, ranks, "") if group == 4 else 0
    # What decoding processes have of their own, about half of it, is the same in all.
    assert alone > 1.6 * apart, "without sharing it does"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_flat_in_the_number_of_sources(tmp_path: Path) -> None:
    clip = clip_bytes(12, 12, keyframe_every=6)
    grown = {}
    for count in (2, 128):
        folders = {}
        for number in range(count):
            records = [video_record(f"s{n}", clip, 12, 12.0) for n in range(4)]
            folders[f"d{number}"] = write_dataset(tmp_path / f"{count}-{number}", records).directory
        config = replace(
            settings(tmp_path), height=64, width=64, num_frames=4, fps=6.0,
            datasets={name: DatasetConfig(str(path)) for name, path in folders.items()},
        )  # fmt: skip
        gc.collect()
        before = pss_bytes()
        datasets = open_datasets(config)
        spec = plan_spec(config, datasets, CostModel(20, 5, 0, 3), seed=3)
        with Loader(spec, datasets, config, end_step=80) as loader:
            seen = {s.ref.dataset for data in loader for pack in data.packs for s in pack}
            grown[count] = pss_bytes() - before
        assert len(seen) == count
    per_source = (grown[128] - grown[2]) / 126
    assert per_source < 64 << 10, f"{per_source / 1024:.0f} KiB for each more"
