"""Every axis, every pair and triples of axes train as one process does, for four kinds of models.

The small size draws some of the layouts by the commit; `make proof` runs all and keeps the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.certify.layouts import full_layouts, layout_name, lowest, num_ranks
from kinodit.trainer.certify.run import Case, Certifier, Row
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import RunConfig, load_config
from tests.support.evidence import write_evidence
from tests.support.ranks import ROOT
from tests.support.sampling import sampled
from tests.support.tasks import TASKS

TEXT = StreamConfig(in_channels=7, output=False, position="none")
IMAGE_AND_VIDEO = MMDiTConfig(
    streams={"text": TEXT, "image": StreamConfig(5), "video": StreamConfig(6)},
    conditions={"text_pooled": ConditionConfig(7)},
    width=48,
    num_heads=4,
    num_kv_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    activation="swiglu",
    block_norm="rms",
    sandwich_norm=True,
    modulation="scale_gate",
    bias=False,
)
TEXT_VIDEO_AUDIO = MMDiTConfig(
    streams={"text": TEXT, "video": StreamConfig(6), "audio": StreamConfig(5, width=24)},
    conditions={"fps": ConditionConfig(1, kind="scalar")},
    width=48,
    num_heads=4,
    num_double_blocks=2,
    modulation_rank=4,
)
ALL_TASKS = replace(
    TEXT_VIDEO_AUDIO,
    streams={"text": TEXT, "video": StreamConfig(6), "audio": StreamConfig(5)},
    num_single_blocks=1,
    experts={"video": ExpertsConfig(4, 2, 1.0), "all": ExpertsConfig(4, 2, 1.0)},
)
TWINS = {
    "text_to_video": twin(load_config(ROOT / "configs" / "t2v_tiny.yaml")),
    "image_and_video": twin(replace(RunConfig(), model=IMAGE_AND_VIDEO)),
    "text_video_audio": twin(replace(RunConfig(), model=TEXT_VIDEO_AUDIO)),
    "all_tasks": twin(replace(RunConfig(), model=ALL_TASKS, tasks=TASKS)),
}
NUM_IN_CI = 5


def cases(small: Twin, size: str, name: str) -> list[Case]:
    everything = full_layouts(small.config.model, small.config.parallel, 8)
    if size == "full":
        exact = [Case(layout) for layout in everything]
        exact += [Case(one, variant="merged") for one in everything if num_ranks(one) == 2]
        return exact + [Case(one, "bfloat16") for one in lowest(everything) if num_ranks(one) <= 4]
    upto4 = [layout for layout in everything if num_ranks(layout) <= 4]
    drawn = sampled(upto4, NUM_IN_CI, size, name)
    drawn += sampled([one for one in everything if one not in upto4], 1, size, f"{name} triples")
    (merged,) = sampled(
        [one for one in everything if num_ranks(one) == 2], 1, size, f"{name} merged"
    )
    return [
        *(Case(layout) for layout in drawn),
        Case(merged, variant="merged"),
        Case(drawn[0], "bfloat16"),
    ]


@pytest.fixture(scope="module")
def kept(size: str) -> Iterator[dict[str, list[dict[str, object]]]]:
    rows: dict[str, list[dict[str, object]]] = {}
    yield rows
    if size == "full" and rows.keys() == TWINS.keys():
        figures = {"models": rows, "num_rows": sum(map(len, rows.values()))}
        write_evidence("certificates", "tests/certificates/test_grid.py", figures)


@pytest.mark.mutants
@pytest.mark.gloo
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TWINS)
def test_layouts(name: str, size: str, kept: dict[str, list[dict[str, object]]]) -> None:
    certifier = Certifier(TWINS[name])
    try:
        rows = [certifier(case) for case in cases(TWINS[name], size, name)]
    finally:
        certifier.close()
    print(name, [(row.layout, row.dtype, row.variant) for row in rows])
    assert len(rows) > NUM_IN_CI
    wrong = [
        (row.layout, row.dtype, row.variant, row.faults, row.where, row.cause)
        for row in rows
        if not row.ok
    ]
    assert not wrong
    kept[name] = [figures(row) for row in rows]


def figures(row: Row) -> dict[str, object]:
    assert row.verdict is not None
    return {
        "layout": row.layout,
        "dtype": row.dtype,
        "variant": row.variant,
        "max_gradient_error": row.verdict.max_gradient_error,
        "parameter_error": row.verdict.parameter_error,
        "noise_ratio": row.verdict.noise_ratio,
        "ok": row.ok,
    }


def test_the_grid_has_what_was_promised() -> None:
    for small in TWINS.values():
        found = {
            layout_name(layout)
            for layout in full_layouts(small.config.model, small.config.parallel, 8)
        }
        assert {"tp=2", "cp=2", "cp=2,ring=2", "dp_shard=2", "dp_replicate=2"} <= found
        assert {"cp=4,ring=4", "dp_shard=4", "dp_replicate=4", "cp=4,ring=2"} <= found
        assert {"cp=2,tp=2", "cp=2,ring=2,tp=2", "dp_shard=2,tp=2", "dp_shard=2,cp=2"} <= found
        assert "dp_replicate=2,tp=2" in found
        assert {"dp_replicate=2,dp_shard=2,tp=2", "dp_shard=2,cp=2,tp=2"} <= found
        assert {"cp=4,ring=2,tp=2", "dp_shard=2,cp=2,ring=2,tp=2"} <= found
    made = TWINS["all_tasks"].config
    layouts = full_layouts(made.model, made.parallel, 8)
    assert "dp_shard=2,ep=2" in {layout_name(layout) for layout in layouts}
