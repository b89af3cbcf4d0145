"""Folders of Megatron-Energon: splits are read as it reads them, and ours are what it expects."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kinodit.data import braces
from kinodit.data.index import ManifestError
from kinodit.data.indexing import IndexOptions, index_shards
from kinodit.data.manifest import Dataset
from kinodit.data.nv_meta import read_split, write_nv_meta
from kinodit.data.reader import ShardReader
from kinodit.launch.cli import main
from tests.data.shards import write_images


def prepared(folder: Path, **changes: Any) -> Path:
    """Four shards of three pictures, and `.nv-meta` as `energon prepare` writes it."""
    write_images(folder)
    for path in (*folder.glob("*.idx"), folder / "manifest.json"):
        path.unlink()
    meta = folder / ".nv-meta"
    meta.mkdir()
    counts = {f"{number:06d}.tar": 3 for number in range(4)}
    info = {"energon_version": "7.4.1", "shard_counts": counts}
    splits: dict[str, Any] = {
        "split_parts": {"train": ["{000002..000000}.tar"], "val": ["000003.tar"], "test": []},
        "exclude": ["000001.tar", "000002.tar/image-007"],
    }
    (meta / ".info.json").write_text(json.dumps(info | changes.pop("info", {})))
    (meta / "split.yaml").write_text(yaml.safe_dump(splits | changes))
    return folder


def keys_of(folder: Path) -> list[str]:
    reader = ShardReader(Dataset(folder))
    found = [reader.read(n).key for n in range(len(reader.dataset))]
    reader.close()
    return found


def test_a_split_is_what_energon_would_read_in_its_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "d")
    assert main(["data", "index", str(folder), "--split", "train"]) == 0
    assert "5 samples in 2 shard(s)" in capsys.readouterr().out
    expected = ["image-006", "image-008", "image-000", "image-001", "image-002"]
    assert keys_of(folder) == expected
    assert main(["data", "index", str(folder), "--split", "val"]) == 0
    assert keys_of(folder) == ["image-009", "image-010", "image-011"]
    # An older name of the same.
    (folder / ".nv-meta" / ".info.json").rename(folder / ".nv-meta" / ".info.yaml")
    assert read_split(folder, "train").counts == {"000002.tar": 3, "000000.tar": 3}


def test_a_prepared_folder_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "a", info={"shard_counts": {"000003.tar": 4}})
    assert main(["data", "index", str(folder), "--split", "val"]) == 2
    assert "000003.tar holds 3 samples, and .nv-meta says 4" in capsys.readouterr().err
    with pytest.raises(ManifestError, match=r"no number of samples for shard 000002\.tar"):
        read_split(folder, "train")
    with pytest.raises(ManifestError, match="no split 'tarin'; it has test, train, val"):
        read_split(folder, "tarin")
    with pytest.raises(ManifestError, match="run `energon prepare`"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x.tar", "does not lie in"),
        ("sub/x.tar", "does not lie in"),
        ("pipe:touch x.tar", "no number of samples"),
        ("{0..99999999999}.tar", "more than 1000 names"),
        ("{0..9}{0..9}{0..9}{0..9}.tar", "more than 1000 names"),
    ],
)
def test_names_of_a_split_are_neither_paths_nor_bombs(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(braces, "MAX_NAMES", 1000)
    folder = prepared(tmp_path / "d", split_parts={"train": [name]})
    with pytest.raises(ManifestError, match=message):
        read_split(folder, "train")


def test_an_export_that_failed_can_be_repeated(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "d")
    shard = tmp_path / "d" / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(512) + whole[512:])
    for _ in range(2):
        with pytest.raises(ManifestError, match="energon cannot leave out"):
            write_nv_meta(dataset)
    shard.write_bytes(whole)
    assert write_nv_meta(dataset).is_dir()
    assert not (tmp_path / "d" / ".nv-meta.partial").exists()


def test_what_is_exported_says_where_everything_lies(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_images(folder)
    index_shards(folder, "d", IndexOptions(without={"000001.tar": frozenset({"image-004"})}))
    dataset = Dataset(folder)
    meta = write_nv_meta(dataset)
    info = json.loads((meta / ".info.json").read_text())
    assert info["shard_counts"] == {f"{number:06d}.tar": 3 for number in range(4)}
    split = read_split(folder, "train")
    assert split.files == tuple(info["shard_counts"])
    assert split.without == {"000001.tar": frozenset({"image-004"})}
    database = sqlite3.connect(meta / "index.sqlite")
    rows = database.execute("SELECT * FROM samples ORDER BY tar_file_id, sample_index").fetchall()
    assert [row[1] for row in rows] == [f"image-{number:03d}" for number in range(12)]
    for shard, key, number, start, size in rows:
        tar = (folder / f"{shard:06d}.tar").read_bytes()
        places = np.fromfile(folder / f"{shard:06d}.tar.idx", "<u8")
        assert places[number] == start and places[number + 1] == start + size
        found = database.execute(
            "SELECT part_name, content_byte_offset, content_byte_size FROM sample_parts "
            "WHERE tar_file_id = ? AND sample_index = ?",
            (shard, number),
        )
        parts = {name: tar[first : first + length] for name, first, length in found}
        assert set(parts) == {"json", "png", "txt"}
        assert json.loads(parts["json"])["id"] == f"picture {int(key[-3:])}"
        assert parts["png"].startswith(b"\x89PNG")
    database.close()
    with pytest.raises(ManifestError, match="is there already"):
        write_nv_meta(dataset)


@pytest.mark.filterwarnings("ignore")
def test_energon_reads_what_is_exported(tmp_path: Path) -> None:
    """Where it is installed (extra `bench`)."""
    energon: Any = pytest.importorskip("megatron.energon")
    folder = tmp_path / "d"
    write_images(folder)
    assert main(["data", "export-energon", str(folder)]) == 0

    @energon.stateless
    def cook(sample: Any) -> Any:
        return energon.TextSample(**energon.basic_sample_keys(sample), text=sample["txt"].decode())

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: Any) -> Any:
            return list(samples)

    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_val_dataset(
        str(folder), split_part="train", worker_config=config, batch_size=1, task_encoder=Encoder()
    )
    found = [(batch[0].__key__, batch[0].text) for batch in energon.get_loader(dataset)]
    assert found == [(f"image-{n:03d}", f"colour number {n}") for n in range(12)]
