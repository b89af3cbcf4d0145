"""Our order under webdataset's own stages, and webdataset's shards under our command."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import webdataset

from kinodit.data.config import DataConfig, DatasetConfig
from kinodit.data.manifest import Dataset
from kinodit.data.pipeline import OrderedSource
from kinodit.data.plan import plan
from kinodit.data.select import plan_spec
from kinodit.data.spec import CostModel, PlanError, PlanSpec
from kinodit.launch.cli import main
from tests.data.clips import small_records, write_dataset
from tests.support.recipes import tiny_recipe, write_clips

Data = tuple[PlanSpec, dict[str, Dataset]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    made = write_dataset(tmp_path_factory.mktemp("p") / "clips", small_records(23))
    config = DataConfig(
        datasets={"clips": DatasetConfig(str(made.directory))},
        num_frames=4, fps=6.0, samples_per_step=7, packs_per_step=3,
    )  # fmt: skip
    return plan_spec(config, {"clips": made}, CostModel(20, 5, 0, 3), seed=1), {"clips": made}


def pipeline(source: OrderedSource) -> Any:
    """Stages as users write them."""
    return webdataset.DataPipeline(
        source,
        webdataset.select(lambda sample: "mp4" in sample),
        webdataset.map(lambda sample: (sample["__step__"], sample["__key__"], len(sample["mp4"]))),
    )


def test_stages_of_users_see_the_plan_in_its_order(data: Data) -> None:
    spec, datasets = data
    found = list(OrderedSource(spec, datasets, end_step=5))
    expected = [
        (step, ref.slot, f"s{ref.index:04d}")
        for step in range(5)
        for pack in plan(spec, step).packs
        for ref in pack
    ]
    assert [(s["__step__"], s["__slot__"], s["__key__"]) for s in found] == expected
    videos = [s for s in found if "mp4" in s]
    through = list(pipeline(OrderedSource(spec, datasets, end_step=5)))
    assert 0 < len(through) < len(found)
    assert through == [(s["__step__"], s["__key__"], len(s["mp4"])) for s in videos]
    assert json.loads(found[0]["json"])["schema"] == 1 and found[0]["__url__"].endswith(".tar")


def test_a_pipeline_goes_on_exactly(data: Data) -> None:
    spec, datasets = data
    whole = list(pipeline(OrderedSource(spec, datasets, end_step=8)))
    source = OrderedSource(spec, datasets, end_step=8)
    taken = list(islice(pipeline(source), 20))
    state = json.loads(json.dumps(source.state_dict()))
    assert 0 < state["step"] < 8
    resumed = OrderedSource(spec, datasets, end_step=8)
    resumed.load_state_dict(state)
    rest = list(pipeline(resumed))
    done = [item for item in taken if item[0] < state["step"]]
    assert done + rest == whole
    with pytest.raises(PlanError, match="of data order other"):
        resumed.load_state_dict({**state, "plan": "other"})


def test_ranks_share_the_steps(data: Data) -> None:
    spec, datasets = data
    alone = {(s["__step__"], s["__slot__"]) for s in OrderedSource(spec, datasets, end_step=4)}
    parts = [
        [(s["__step__"], s["__slot__"]) for s in OrderedSource(spec, datasets, r, 2, end_step=4)]
        for r in range(2)
    ]
    assert len(parts[0]) + len(parts[1]) == len(alone) and set(parts[0]) | set(parts[1]) == alone


def test_our_command_trains_from_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", 12)
    (tmp_path / "shards").mkdir()
    pattern = str(tmp_path / "shards" / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for path in sorted((tmp_path / "clips").glob("*.mp4")):
            caption = path.with_suffix(".txt").read_text()
            writer.write({"__key__": path.stem, "mp4": path.read_bytes(), "txt": caption})
    assert main(["data", "index", str(tmp_path / "shards")]) == 0
    recipe = tiny_recipe(tmp_path, tmp_path / "shards", run={"steps": 3, "out_dir": str(tmp_path)})
    assert main(["train", str(recipe), "run.name=run"]) == 0
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
