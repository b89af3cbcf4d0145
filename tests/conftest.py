"""Settings every test runs under."""

from __future__ import annotations

import os

import pytest

# Set before torch is imported: tests start processes of their own on few cores, and one thread
# each is both faster there and the same order of summation everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Nothing may be fetched at run time.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that itself runs under torchrun or Slurm must not inherit a world from it."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    for name in list(os.environ):
        if name in launcher or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        choices=("ci", "full"),
        default="ci",
        help="how much the long suites do: minutes, or all of it (make proof keeps the figures)",
    )


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    """`ci` or `full`."""
    chosen: str = request.config.getoption("--size")
    return chosen
