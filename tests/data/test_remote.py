"""Shards over HTTP: what is there arrives whole, once, in time; what is not is said."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinodit.data.config import DataConfig, DatasetConfig, StorageConfig
from kinodit.data.decode import DecodedMedia, View
from kinodit.data.loader import Loader
from kinodit.data.manifest import Dataset, ManifestError
from kinodit.data.order_report import collect
from kinodit.data.picture import CENTRE
from kinodit.data.reader import SampleError, ShardError, ShardReader
from kinodit.data.record import Record
from kinodit.data.remote import RemoteShards, open_dataset
from kinodit.data.select import open_datasets, plan_spec
from kinodit.data.spec import CostModel
from kinodit.data.storage import StorageError, is_remote, open_storage
from tests.data.clips import write_dataset
from tests.data.test_reader import records
from tests.support.quick import quick
from tests.support.servers import FileServer, nginx

COUNT = 24
Serve = Callable[..., FileServer]
Opened = Callable[[Dataset], ShardReader]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_dataset(tmp_path / "clips", records(COUNT), shard_bytes=12_000)
    assert len(made.manifest.shards) >= 4
    return made.directory


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """script -> a server of the folder."""
    made: list[FileServer] = []

    def start(script: Callable[[int], str] = lambda _: "") -> FileServer:
        made.append(FileServer(folder, script))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(
        cache_dir=str(tmp_path / "cache"), attempts=5, attempt_limit_s=0.5, wait_s=0.01
    )


@pytest.fixture
def opened() -> Iterator[Callable[[Dataset], ShardReader]]:
    """dataset -> a reader that is closed after the test."""
    made: list[ShardReader] = []

    def start(dataset: Dataset) -> ShardReader:
        made.append(ShardReader(dataset))
        return made[-1]

    yield start
    for reader in made:
        reader.close()


def read_all(dataset: Dataset, order: list[int] | None = None) -> list[Record]:
    reader = ShardReader(dataset)
    found = [reader.read(index) for index in order or range(COUNT)]
    reader.close()
    return found


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_what_is_read_is_what_lies_there(
    serve: Serve, config: StorageConfig, cache_gib: float
) -> None:
    server = serve()
    dataset = open_dataset(server.url, replace(config, cache_gib=cache_gib, block_mib=0.003))
    assert read_all(dataset) == records(COUNT)
    assert dataset.place_of(dataset.manifest.shards[0]) == f"{server.url}/000000.tar"


def test_indexes_are_fetched_side_by_side(
    serve: Serve, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, real = threading.Barrier(2), RemoteShards.whole

    def whole(self: RemoteShards, name: str) -> bytes:
        if name in ("000000.idx", "000001.idx"):
            # Each is asked for before the other has come.
            both.wait(timeout=10)
        return real(self, name)

    monkeypatch.setattr(RemoteShards, "whole", whole)
    assert len(open_dataset(serve().url, config)) == COUNT


FAULTS = ["503", "500", "429", "cut", "reset", "stall", "drip"]


@pytest.mark.parametrize(
    ("fault", "cache_gib"),
    quick(
        itertools.product(FAULTS, [0.0, 1.0]),
        *(("503", 0.0), ("429", 1.0), ("cut", 1.0), ("reset", 0.0), ("stall", 0.0), ("drip", 1.0)),
    ),
)
def test_what_passes_is_tried_again(
    serve: Serve, config: StorageConfig, fault: str, cache_gib: float
) -> None:
    # Two of three requests fail, the slow ones at their time limit.
    server = serve(lambda number: fault if number < 6 and number % 3 else "")
    # A busy machine may miss the time limit by itself.
    patient = replace(config, cache_gib=cache_gib, attempts=12)
    start = time.monotonic()
    assert read_all(open_dataset(server.url, patient)) == records(COUNT)
    assert time.monotonic() - start < 30
    assert [f for _, _, f in server.requests if f] == [fault] * 4


def test_bytes_that_were_damaged_on_their_way_are_fetched_again(
    serve: Serve, config: StorageConfig
) -> None:
    server = serve(lambda number: "garbage" if number == 2 else "")
    assert read_all(open_dataset(server.url, config)) == records(COUNT)
    cached = serve(lambda number: "garbage" if number == 0 else "")
    assert read_all(open_dataset(cached.url, replace(config, cache_gib=1.0))) == records(COUNT)


def test_damage_at_its_source_is_a_bad_sample(
    serve: Serve, folder: Path, config: StorageConfig, opened: Opened
) -> None:
    path, offset, _ = Dataset(folder).locate(3)
    data = bytearray(path.read_bytes())
    data[offset + 600] ^= 1
    path.write_bytes(data)
    reader = opened(open_dataset(serve().url, config))
    with pytest.raises(SampleError, match=r"http://.*000000\.tar: sample 3.*CRC-32") as error:
        reader.read(3)
    assert error.value.key == "s003"
    assert reader.read(4) == records(COUNT)[4]


def test_what_does_not_pass_ends_with_what_was_tried(
    serve: Serve, config: StorageConfig, opened: Opened
) -> None:
    server = serve(lambda _: "503")
    reader = opened(open_dataset(server.url, config))
    with pytest.raises(ShardError, match=r"5 attempts failed; the last one: .*answered 503") as e:
        reader.read(0)
    assert not isinstance(e.value, SampleError), "storage that is down is no fault of a sample"
    assert len(server.requests) == 5 + 1 + len(reader.dataset.manifest.shards)
    (server.folder / "000001.tar").unlink()
    gone = opened(open_dataset(serve().url, config))
    with pytest.raises(ShardError, match="answered 404"):
        gone.read(COUNT // 3)


def test_ranks_of_a_node_fetch_nothing_twice(serve: Serve, config: StorageConfig) -> None:
    server = serve()
    shared = replace(config, cache_gib=1.0, block_mib=0.003)
    dataset = open_dataset(server.url, shared)
    ready = threading.Barrier(8)

    def rank(number: int) -> bool:
        ready.wait()
        order = [(index * 7 + number) % COUNT for index in range(COUNT)]
        return read_all(dataset, order) == [records(COUNT)[index] for index in order]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(rank, range(8)))
    asked = server.ranges()
    assert len(asked) == len(set(asked)) > 10
    again = len(server.requests)
    assert read_all(open_dataset(server.url, shared)) == records(COUNT)
    assert len(server.requests) == again + 1, "a restart asks for the manifest only"


def test_traffic_is_counted(serve: Serve, config: StorageConfig, opened: Opened) -> None:
    dataset = open_dataset(serve(lambda n: "503" if n == 0 else "").url, config)
    reader = opened(dataset)
    size = dataset.span(0)[2]
    reader.read(0)
    assert (reader.traffic.used_bytes, reader.traffic.fetched_bytes) == (size, size)
    assert reader.traffic.num_retries == 1
    assert reader.traffic.fetched_per_used == 1.0


def test_a_loader_says_what_was_fetched_for_what_was_used(
    serve: Serve, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = DecodedMedia(
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8), None, 8.0, 0.0, View(0, CENTRE)
    )
    monkeypatch.setattr("kinodit.data.decoders.decode", lambda *_: media)
    kept = replace(config, cache_gib=1.0, block_mib=0.003)
    url = serve().url
    settings = DataConfig(
        datasets={"clips": DatasetConfig(url)}, storage=kept, samples_per_step=2, use_audio=False,
        num_frames=1, height=8, width=8, workers="threads",
    )  # fmt: skip
    datasets = open_datasets(settings)
    spec = plan_spec(settings, datasets, CostModel(4, 4), seed=0)
    told = collect(spec, datasets, 1, COUNT // 2).steps.fetched
    with Loader(spec, datasets, settings, end_step=COUNT // 2) as loader:
        assert loader.traffic.fetched_per_used is None
        assert sum(1 for _ in loader) == COUNT // 2
        assert told == pytest.approx(loader.traffic.fetched_per_used)
    assert told is not None and told >= 1.0
    for num_steps in (1, 2):
        fewer = collect(spec, datasets, 1, num_steps).steps.fetched
        assert fewer is not None and fewer > told, "blocks hold more than these steps use"
    plain = {"clips": open_dataset(url, config)}
    assert collect(spec, plain, 1, 2).steps.fetched is None


@pytest.mark.parametrize(
    "place",
    ["pipe:touch x", "file:///etc", "ssh://host/x", "simplecache::s3://a/b", "shell://x",
     "local://x", "zip://a::http://b"],
)  # fmt: skip
def test_other_schemes_are_refused(place: str, config: StorageConfig) -> None:
    with pytest.raises(StorageError, match="nothing else is opened"):
        open_dataset(place, config)
    assert not is_remote("/data/clips") and not is_remote("data/clips")


def test_a_redirect_may_not_leave_http(serve: Serve, config: StorageConfig) -> None:
    server = serve(lambda _: "301")
    with pytest.raises(StorageError, match=r"answered 301"):
        storage = open_storage(server.url)
        try:
            storage.read("000000.tar", 0, 10, 1.0)
        finally:
            storage.close()


def test_a_place_without_a_dataset_is_named(tmp_path: Path, config: StorageConfig) -> None:
    server = FileServer(tmp_path)
    with pytest.raises(StorageError, match=r"manifest\.json cannot be read: .* 404"):
        open_dataset(server.url, config)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match="not a manifest"):
        open_dataset(server.url, config)
    server.close()


def test_a_real_nginx(folder: Path, tmp_path: Path, config: StorageConfig, opened: Opened) -> None:
    work = tmp_path / "nginx"
    work.mkdir()
    with nginx(folder, work) as url:
        reader = opened(open_dataset(url, config))
        assert reader.read(0) == records(COUNT)[0]
        # The server has ended the idle connection by then.
        time.sleep(1.5)
        assert [reader.read(index) for index in range(COUNT)] == records(COUNT)
        assert reader.traffic.num_retries == 0
