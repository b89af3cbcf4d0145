"""Streams: every sample comes or is told of, none does harm, and nobody calls them exact."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from kinodit.data import archive_stream
from kinodit.data.archive_stream import archive_samples
from kinodit.data.config import DataConfig, DatasetConfig, StorageConfig, StreamConfig
from kinodit.data.loader import Loader
from kinodit.data.reader import SampleError, ShardError
from kinodit.data.record import Record
from kinodit.data.select import open_datasets, plan_spec
from kinodit.data.spec import CostModel, PlanError
from kinodit.data.stream import StreamedDataset, StreamReader
from kinodit.models.errors import ConfigError
from tests.data.clips import small_records, write_dataset
from tests.data.shards import picture, tar_bytes
from tests.support.servers import FileServer

HURRIED = StorageConfig(attempts=2, attempt_limit_s=1.0, wait_s=0.01, max_wait_s=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty samples in compressed archives a.tar.gz, b.tar.gz, ... and nothing beside them."""
    root = tmp_path_factory.mktemp("stream")
    records = [record for record in small_records(25) if record.meta.modality == "video"]
    dataset = write_dataset(root / "plain", records, shard_bytes=24 << 10)
    (root / "packed").mkdir()
    for name, shard in zip("abcdefgh", dataset.manifest.shards, strict=False):
        data = (dataset.directory / shard.file).read_bytes()
        (root / "packed" / f"{name}.tar.gz").write_bytes(gzip.compress(data))
    return root / "packed"


def names_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.glob("*.tar.gz")))


def stream_of(path: object, shards: tuple[str, ...], **options: Any) -> StreamedDataset:
    config = DatasetConfig(
        str(path), stream=StreamConfig(shards, num_samples=1000, shuffle_buffer=8)
    )
    return StreamedDataset("web", config, HURRIED, **options)


def taken(dataset: StreamedDataset, count: int, part: int = 0) -> list[Record | SampleError]:
    reader = StreamReader(dataset, seed=3, part=part)
    found: list[Record | SampleError] = []
    for number in range(count):
        try:
            found.append(reader.read(number))
        except SampleError as error:
            found.append(error)
    reader.close()
    return found


def keys(found: list[Record | SampleError]) -> list[str]:
    return [item.key for item in found if isinstance(item, Record)]


def whole(path: Path) -> list[Record | SampleError]:
    return list(archive_samples(path.name, str(path), None, HURRIED))


def test_every_sample_of_compressed_archives_comes(folder: Path) -> None:
    dataset = stream_of(folder, names_of(folder))
    found = taken(dataset, 300)
    counts = Counter(keys(found))
    assert set(counts) == {f"s{n:04d}" for n in range(25) if n % 5 != 4}
    assert sum(counts.values()) == 300
    assert keys(found) == keys(taken(dataset, 300)), "one rank, one thread: the same again"
    assert keys(found) != keys(taken(dataset, 300, part=1)), "other ranks see another order"


def test_a_loader_trains_from_it_and_says_that_it_is_not_exact(folder: Path) -> None:
    settings = DataConfig(
        datasets={
            "web": DatasetConfig(
                str(folder), stream=StreamConfig(("{a,b,c,d}.tar.gz",), 4, shuffle_buffer=8)
            )
        },
        num_frames=4, fps=6.0, height=32, width=32, samples_per_step=4, packs_per_step=2,
        window="first", cache_mib=16, num_threads=1,
    )  # fmt: skip
    datasets = open_datasets(settings)
    assert not datasets["web"].is_exact
    spec = plan_spec(settings, datasets, CostModel(20, 5, 0, 3), seed=3)
    assert spec.describe()["datasets"][0]["is_exact"] is False  # type: ignore[index]
    seen = []
    with Loader(spec, datasets, settings, dp_index=1, dp_size=2, end_step=6) as loader:
        for data in loader:
            for pack in data.packs:
                for sample in pack:
                    assert sample.video is not None and sample.video.shape == (4, 32, 32, 3)
                    assert sample.caption.endswith(sample.meta.id)
                    seen.append(sample.meta.id)
    # The plan goes through four places again and again, the stream goes on: nothing is kept.
    stream = stream_of(folder, names_of(folder)[:4])
    assert seen == keys(taken(stream, len(seen), part=1)) and len(set(seen)) > 4


def test_a_server_without_ranges_is_streamed(folder: Path) -> None:
    server = FileServer(folder)
    found = taken(stream_of(server.url, names_of(folder)), 60)
    assert len(keys(found)) == 60
    assert {wanted for _, wanted, _ in server.requests} == {""}, "no range is asked for"
    server.close()


@pytest.mark.parametrize(
    "fault",
    [
        "cut",
        "garbage",
        "503",
        "reset",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("stall", "drip")),
    ],
)
def test_what_a_server_breaks_is_told_and_the_rest_goes_on(
    folder: Path, tmp_path: Path, fault: str
) -> None:
    """The second request and each that repeats it fail; all others are answered."""
    for name in names_of(folder):
        (tmp_path / name.removesuffix(".gz")).write_bytes(
            gzip.decompress((folder / name).read_bytes())
        )
    server = FileServer(tmp_path, lambda number: fault if number in (1, 2, 3) else "")
    names = tuple(name.removesuffix(".gz") for name in names_of(folder))
    found = taken(stream_of(server.url, names), 40)
    errors = [str(item) for item in found if isinstance(item, SampleError)]
    server.close()
    assert len(keys(found)) >= 20
    assert errors, "what is lost is told"
    said = ("is streamed, so that all of it behind byte", "has no samples")
    assert all(any(part in error for part in said) for error in errors)


def test_damage_ends_an_archive_with_a_word(tmp_path: Path) -> None:
    members = {
        f"s{n}.{e}": picture(n) if e == "png" else b"a square"
        for n in range(6)
        for e in ("png", "txt")
    }
    data = bytearray(tar_bytes(members))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
        place = next(member.offset for member in archive if member.name == "s3.png")
    data[place + 130] ^= 0x40
    (tmp_path / "a.tar").write_bytes(data)
    found = whole(tmp_path / "a.tar")
    assert keys(found) == ["s0", "s1", "s2"]
    assert f"the header at byte {place} is damaged" in str(found[-1])
    (tmp_path / "b.tar").write_bytes(tar_bytes(members)[: place + 600])
    found = whole(tmp_path / "b.tar")
    assert keys(found) == ["s0", "s1", "s2"]
    assert "is cut off" in str(found[-1])
    (tmp_path / "c.tar").write_bytes(tar_bytes(members)[:place])
    assert "was cut off there" in str(whole(tmp_path / "c.tar")[-1])


def test_one_bad_sample_is_one_fault(tmp_path: Path) -> None:
    members = [
        ("a.png", picture(0)),
        ("b.pkl", b"cos\nsystem\n."),
        ("c.png", picture(2)),
        ("d.txt", b"only"),
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    found = whole(tmp_path / "x.tar")
    assert keys(found) == ["a", "c"]
    assert [item.key for item in found if isinstance(item, SampleError)] == ["b", "d"]


def test_little_that_inflates_to_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_stream, "SLACK_BYTES", 1 << 20)
    bomb = gzip.compress(tar_bytes({"a.png": bytes(24 << 20)}))
    assert len(bomb) < 100_000
    (tmp_path / "a.tar.gz").write_bytes(bomb)
    (found,) = whole(tmp_path / "a.tar.gz")
    assert "inflate to more than" in str(found)
    header = tarfile.TarInfo("a.png")
    header.size = 60 << 30
    (tmp_path / "b.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    (found,) = whole(tmp_path / "b.tar")
    assert "claims" in str(found) or "there is no tar header" in str(found)
    (tmp_path / "c.tar.gz").write_bytes(b"no gzip at all")
    (found,) = whole(tmp_path / "c.tar.gz")
    assert "lost this time" in str(found)


@pytest.mark.parametrize(
    "name", ["pipe:touch x", "../x.tar", "/etc/x.tar.gz", "x.zip", "a/b.tar", "http://h/x.tar"]
)
def test_names_that_are_no_archives_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="is not the name of an archive"):
        stream_of(tmp_path, (name,))


def test_a_stream_without_samples_ends_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    assert "a.tar has no samples" in str(taken(stream_of(tmp_path, ("a.tar",)), 2)[1])
    with pytest.raises(ShardError, match="the stream of dataset 'web' has no samples"):
        taken(stream_of(tmp_path, (), pipeline=lambda: []), 1)
    (tmp_path / "b.tar").write_bytes(tar_bytes({"a.png": picture()}) + b"behind its end")
    assert "bytes after its end-of-archive marker" in str(whole(tmp_path / "b.tar")[-1])
    (found,) = whole(tmp_path / "nowhere.tar")
    assert "cannot be read: No such file" in str(found)


def test_a_pipeline_of_ones_own_is_streamed(folder: Path) -> None:
    samples = [
        {"__key__": f"part/s{number}", "png": picture(number), "txt": "a square"}
        for number in range(8)
    ]

    def pipeline() -> webdataset.DataPipeline:
        return webdataset.DataPipeline(
            [samples], webdataset.select(lambda sample: sample["__key__"] > "part/s2")
        )

    found = taken(stream_of(folder, (), pipeline=pipeline), 12)
    assert keys(found) == [*(f"s{n}" for n in range(3, 8))] * 2 + ["s3", "s4"]
    assert isinstance(found[0], Record) and found[0].meta.captions[0].text == "a square"
    (wrong,) = taken(
        stream_of(folder, (), pipeline=lambda: [{"__key__": "a/k", "png": picture(), "cls": 3}]), 1
    )
    assert "its cls is a int" in str(wrong)


def test_what_needs_an_index_is_refused_of_a_stream() -> None:
    stream = StreamConfig(("a.tar.gz",), 10)
    with pytest.raises(ConfigError, match="need an index"):
        DatasetConfig("x", stream=stream, filter="height > 3")
    with pytest.raises(ConfigError, match=r"data\.sizes=own"):
        DataConfig(datasets={"web": DatasetConfig("x", stream=stream)}, sizes="own")
    with pytest.raises(ConfigError, match="num_samples"):
        StreamConfig(("a.tar.gz",))
