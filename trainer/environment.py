"""What a run ran on: versions and devices, written beside its metrics for the report's header."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

import kinodit

ENVIRONMENT_FILE = "environment.json"


def describe_environment(world_size: int) -> dict[str, str | int]:
    """Versions, the device of this process, and the number of ranks. No host or user names."""
    return {
        "kinodit": kinodit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device(),
        "num_ranks": world_size,
    }


def save_environment(run_dir: Path, world_size: int) -> None:
    """Write `describe_environment` to the run folder; a resumed run replaces it."""
    text = json.dumps(describe_environment(world_size), indent=1) + "\n"
    (run_dir / ENVIRONMENT_FILE).write_text(text)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    """The processor's marketing name where the kernel tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
