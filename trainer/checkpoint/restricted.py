"""The index of a checkpoint's tensors, read without executing anything.

DCP keeps the index as a pickle and reads it as one, which lets a crafted file run code. Here a
pickle may name the classes below and nothing else; entries other than tensors, which DCP would
unpickle as well, and files outside the checkpoint are refused.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

from kinodit.trainer.checkpoint.manifest import BrokenCheckpoint

INDEX_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint"
ALLOWED = {
    (f"{_DCP}.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in ALLOWED:
            raise BrokenCheckpoint(
                f"it names {module}.{name}, which no index of tensors needs: it may be an attempt "
                "to run code; do not use this checkpoint"
            )
        return getattr(importlib.import_module(module), name)


def read_index(path: Path) -> Any:
    """DCP's `Metadata` of the checkpoint folder `path`.

    Raises:
        BrokenCheckpoint: it is damaged, names anything but an index of tensors needs, or points
            outside the folder.
    """
    where = f"{path.name}/{INDEX_FILE}"
    try:
        with (path / INDEX_FILE).open("rb") as stream:
            index = _Unpickler(stream).load()
        _check(index)
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(f"{where}: {error}") from error
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{where}: expected a file, found none") from error
    # A damaged pickle raises whatever the bytes happen to say.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BrokenCheckpoint(f"{where}: damaged ({type(error).__name__}: {reason})") from error
    return index


def _check(index: Any) -> None:
    for key, entry in index.state_dict_metadata.items():
        if type(entry).__name__ != "TensorStorageMetadata":
            raise BrokenCheckpoint(f"entry {key!r} is a {type(entry).__name__}, not a tensor")
    for info in index.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise BrokenCheckpoint(f"it points to {name!r}, outside the checkpoint")
        if info.transform_descriptors:
            raise BrokenCheckpoint(f"it asks for transformations {info.transform_descriptors!r}")
