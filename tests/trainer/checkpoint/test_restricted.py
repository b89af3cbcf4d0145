"""A crafted index does not run code, neither here nor in what DCP would unpickle for it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from kinodit.trainer import checkpoint
from kinodit.trainer.checkpoint import BrokenCheckpoint
from kinodit.trainer.checkpoint.manifest import Manifest, read_manifest, record_of
from kinodit.trainer.checkpoint.restricted import read_index
from tests.support.checkpoints import MESH, empty, save


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.mark), os.O_CREAT)


def forge(path: Path, index: bytes, **more: bytes) -> None:
    """Put files into a checkpoint with a manifest that agrees: the attacker can write it, too."""
    manifest = read_manifest(path)
    files = dict(manifest.files)
    for name, data in {".metadata": index, **more}.items():
        (path / name).write_bytes(data)
        files[name] = record_of(data)
    text = Manifest(manifest.step, files, manifest.facts).to_text()
    (path / "manifest.json").write_text(text)


def saved_bytes(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_code_in_the_index_is_not_run(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    mark = tmp_path / "mark"
    forge(path, pickle.dumps(Attack(mark)))
    with pytest.raises(BrokenCheckpoint, match=r"open.*may be an attempt to run code"):
        checkpoint.load(path, empty(), MESH)
    assert not mark.exists()
    with pytest.warns(UserWarning), pytest.raises(dcp.CheckpointException):
        dcp.load(dict(empty()), checkpoint_id=path, no_dist=True)
    assert mark.exists(), "the attack is none"


def test_code_in_an_entry_that_claims_to_be_bytes_is_not_run(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    mark = tmp_path / "mark"
    payload = saved_bytes(Attack(mark))
    where = {MetadataIndex(name): _StorageInfo("bytes", 0, len(payload)) for name in empty()}
    entries = {name: BytesStorageMetadata() for name in empty()}
    forge(path, pickle.dumps(Metadata(entries, None, where)), bytes=payload)  # type: ignore[arg-type]
    with pytest.raises(BrokenCheckpoint, match="BytesStorageMetadata"):
        checkpoint.load(path, empty(), MESH)
    assert not mark.exists()
    with pytest.warns(UserWarning):
        dcp.load(dict(empty()), checkpoint_id=path, no_dist=True)
    assert mark.exists(), "the attack is none"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_files_outside_are_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = name
    forge(path, pickle.dumps(index))
    with pytest.raises(BrokenCheckpoint, match="outside the checkpoint"):
        checkpoint.load(path, empty(), MESH)


def test_files_of_which_nothing_is_known_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "unlisted"
    (path / "unlisted").write_bytes((path / "__0_0.distcp").read_bytes())
    forge(path, pickle.dumps(index))
    with pytest.raises(BrokenCheckpoint, match="unlisted: not in the manifest"):
        checkpoint.load(path, empty(), MESH)


def test_what_dcp_writes_is_read(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    tensors = {f"w{index}": torch.ones(2, dtype=dtype) for index, dtype in enumerate(dtypes)}
    path = save(tmp_path, 1, tensors=tensors)
    index = read_index(path)
    assert [index.state_dict_metadata[name].properties.dtype for name in tensors] == list(dtypes)
    loaded = {name: torch.zeros_like(value) for name, value in tensors.items()}
    checkpoint.load(path, loaded, MESH)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
