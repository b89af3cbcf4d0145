"""Folders of weights on the local disk: where they are, and a hash of what is in them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from kinodit.models.encoders.base import EncoderError


def weights_folder(path: str | None, package: str | None, what: str) -> Path:
    """The folder that a config names, by path or as an installed package that carries weights.

    A package is looked up without being imported. Raises EncoderError when neither or both are
    given, and when there is no such folder, or no `config.json` in it.
    """
    if (path is None) == (package is None):
        raise EncoderError(f"{what} needs either a path or a package, got {path=}, {package=}")
    if path is not None:
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise EncoderError(
                f"{what}: there is no config.json in {folder}; the path must be a local folder "
                f"with config.json and *.safetensors (nothing is downloaded at run time)"
            )
        return folder
    assert package is not None
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(
            f"{what}: the Python package {package!r} is not installed: "
            f"pip install {package.replace('_', '-')}"
        )
    for root in spec.submodule_search_locations:
        for config in sorted(Path(root).rglob("config.json")):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    raise EncoderError(
        f"{what}: the package {package!r} has no folder with config.json and *.safetensors"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises EncoderError for a missing or malformed file."""
    try:
        document = json.loads(file.read_text())
    except OSError as error:
        raise EncoderError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise EncoderError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise EncoderError(f"{file} holds no JSON object")
    return document


def fingerprint(folders: Iterable[Path], settings: object) -> str:
    """Sha256 of `settings` and of the weights, configs and tokenizers in `folders`."""
    digest = hashlib.sha256(repr(settings).encode())
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix in {".safetensors", ".json", ".txt", ".model"} and file.is_file():
                stat = file.stat()
                content = _file_hash(file.resolve(), stat.st_size, stat.st_mtime_ns)
                digest.update(f"\n{file.name}:{content}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    """Read once in a process for as long as size and time of modification stay."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
