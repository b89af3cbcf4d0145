"""What was compiled at run time: in the default run nothing may be, as it takes a minute or hangs.

Extensions of libraries and kernels of torch's compiler are built into folders that the environment
names, whichever process asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDERS = ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Variables that say where a build goes, and its lock."""


def folders_below(root: Path) -> dict[str, str]:
    """Variable -> a folder of its own in `root`."""
    return {name: str(root / name.lower()) for name in FOLDERS}


def built(environment: Mapping[str, str]) -> set[str]:
    """Files in these folders: sources, locks and what came of them."""
    roots = (Path(environment[name]) for name in FOLDERS if name in environment)
    return {str(path) for root in roots for path in root.rglob("*") if path.is_file()}
