"""Memory stays where it is, however many clips go through."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Literal

import pytest
from msgspec import structs

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.loader import Loader
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel
from tests.data.clips import small_records, write_dataset

WARM_UP, CLIPS, PER_STEP = 2_000, 10_000, 50


def resident_bytes(loader: Loader) -> int:
    """Of this process, and of those that decode for it."""
    gc.collect()
    workers = [str(worker.pid) for worker in loader._samples.decoders.workers]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in ("self", *workers)]
    return sum(pages) * 4096


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_memory_does_not_grow(tmp_path: Path, workers: Literal["threads", "processes"]) -> None:
    """Every twentieth sample is damaged: faults and substitutes must not pile up either."""
    records = small_records(40)
    for number in (7, 27):
        records[number] = structs.replace(records[number], members={"mp4": b"garbage" * 100})
    dataset = write_dataset(tmp_path / "clips", records)
    settings = DataConfig(
        datasets={"clips": DatasetConfig(str(dataset.directory))},
        num_frames=4, fps=6.0, height=32, width=32, crop="random", samples_per_step=PER_STEP,
        packs_per_step=2, cache_mib=1, workers=workers,
    )  # fmt: skip
    spec = plan_spec(settings, {"clips": dataset}, CostModel(20, 5, 0, 3), seed=3)
    before, end_step = 0, (WARM_UP + CLIPS) // PER_STEP
    with Loader(spec, {"clips": dataset}, settings, end_step=end_step) as loader:
        for data in loader:
            if (data.step + 1) * PER_STEP == WARM_UP:
                before = resident_bytes(loader)
        assert bool(loader._samples.decoders.workers) == (workers == "processes")
        after = resident_bytes(loader)
    assert before > 0
    assert after <= 1.05 * before, f"{before >> 20} MiB became {after >> 20} MiB"
